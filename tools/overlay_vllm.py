"""Makes another vLLM's Python files importable on the compiled extensions of the CPU build that is installed.

    python tools/overlay_vllm.py 0.33.0 build/vllm-0.33.0
    PYTHONPATH=build/vllm-0.33.0 python -m pytest tests/vllm_mcmoe

For versions that PyPI has no CPU build of. The wheel is the CUDA one, 340 MB; the source distribution would be 47 MB,
but pip hands it out only after building it. It is kept in OUT/../wheels. Extensions keep the interface of the version
they were built for, so this shows that the plugin and that version's Python fit together, and no more.
"""

import argparse
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

LIBRARY = ".abi3.so"


def download(version: str, directory: Path) -> Path:
    """The wheel of a version, from `directory` where an earlier call left it there."""
    pattern = f"vllm-{version}-*.whl"
    if not list(directory.glob(pattern)):
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", "vllm"]
        subprocess.run([*pip, "--progress-bar", "off", "--dest", str(directory), f"vllm=={version}"], check=True)
    (wheel,) = directory.glob(pattern)
    return wheel


def installed_package() -> Path:
    """Directory of the installed vLLM, found without importing it and whatever PYTHONPATH says."""
    find = "import importlib.util; print(importlib.util.find_spec('vllm').submodule_search_locations[0])"
    found = subprocess.run([sys.executable, "-I", "-c", find], check=True, capture_output=True, text=True)
    return Path(found.stdout.strip())


def overlay(version: str, out: Path) -> None:
    """Fill `out` with the package and its version: all files of the wheel but its extensions, those of this build."""
    wheel = download(version, out.parent / "wheels")
    shutil.rmtree(out, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        files = [name for name in archive.namelist() if name.startswith("vllm/") and not name.endswith(".so")]
        archive.extractall(out, files)
    build = installed_package()
    libraries = sorted(build.rglob(f"*{LIBRARY}"))
    if not any(library.name == f"_C{LIBRARY}" for library in libraries):
        sys.exit(f"{build}: no _C{LIBRARY}; expected vLLM's CPU build, as `make setup` installs it.")
    for library in libraries:
        link = out / "vllm" / library.relative_to(build)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(library)
    # vLLM chooses its CPU platform by "cpu" in this version.
    metadata = out / f"vllm-{version}+cpu.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version", help="of a wheel of vllm on PyPI")
    parser.add_argument("out", type=Path, help="directory to make, or to make again")
    arguments = parser.parse_args()
    overlay(arguments.version, arguments.out.resolve())


if __name__ == "__main__":
    main()
