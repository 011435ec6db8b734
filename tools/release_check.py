"""What README.md tells a new user to do, done: from the wheel, in a fresh virtual environment, away from the checkout.

    make release-check           # or python -m tools.release_check --help

Builds the distributions as a release does, installs the wheel with [cpu] into a new environment, and runs the commands
of the README there: doctor, doctor --mend, demo, plan-resources, quantize by a name on the hub, inspect, report,
evaluate, vllm serve, and a request to it. The hub is tests/hub_server.py with the reference model; home directory and
caches are new, and nothing of the checkout is on the path. Ends with 1 at the first command that does not do what the
README says, naming its log. Takes 4 GB in --work, which are removed when all is well.

Needs nothing but Python and pip. Where pip's own configuration leads to a torch built for CPUs, `--torch-index ""`
leaves out the README's --extra-index-url.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.hub_server import running_hub
from vllm_mcmoe.errors import McmoeError
from vllm_mcmoe.local_server import running

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "benchmarks" / "reference_model"
NAME = "vllm-mcmoe/tiny-mixtral"  # on the hub of this process
OUT = "tiny-2.5bit"
CPU_TORCH = "https://download.pytorch.org/whl/cpu"
# Of the README's commands: the tests give them, and need no wheel
LEFT_OUT = ("allocate", "calibrate", "prune", "push")
LARGEST_KL = 0.1  # nats per token: 0.057 at 1.94 bits with the built-in text (docs/method.md), several of a broken one
PROMPT = "And the LORD said unto Moses,"


class CheckFailed(Exception):
    """A command did not do what README.md says of it."""


def main() -> None:
    options = _arguments()
    work = options.work.resolve()
    if work.exists():
        sys.exit(f"release check: {work} is there already, of an earlier check? Remove it, or name another --work.")
    work.mkdir(parents=True)
    started = time.monotonic()
    try:
        wheel = options.wheel.resolve() if options.wheel else build_wheel(work)
        user = User(work, install(work, wheel, options.torch_index))
        check(user, options.serve_options)
    except CheckFailed as failed:
        sys.exit(f"release check: {failed}")
    if not options.keep:
        shutil.rmtree(work)
    print(f"All of it works; {(time.monotonic() - started) / 60:.0f} minutes.")


class User:
    """Someone with the new environment: an empty home and working directory, nothing of this process's settings but
    where commands and certificates are. Every command has a log, 00-doctor.log and so on."""

    def __init__(self, work: Path, environment: Path):
        self.work, self.bin = work, environment / "bin"
        self.home, self.directory = work / "home", work / "away"
        self.home.mkdir()
        self.directory.mkdir()
        kept = ("PATH", "LANG", "TMPDIR", "SSL_CERT_FILE", "OMP_NUM_THREADS")
        self.variables = {name: os.environ[name] for name in kept if name in os.environ}
        self.variables |= {"HOME": str(self.home), "PATH": f"{self.bin}{os.pathsep}{self.variables['PATH']}"}
        self.logs = 0

    def run(self, command: Sequence[str], exit_code: int = 0, contains: str = "") -> str:
        """The output of a command, which has to end with exit_code and say what it contains. Raises CheckFailed."""
        log = self.new_log(command)
        run(command, log, exit_code, env=self.variables, cwd=self.directory)
        said = log.read_text(errors="replace")
        if contains not in " ".join(said.split()):
            raise CheckFailed(f"`{' '.join(command)}` does not say {contains!r}: {log}")
        return said

    def new_log(self, command: Sequence[str]) -> Path:
        self.logs += 1
        return self.work / f"{self.logs:02}-{'-'.join(command[:2]).replace('/', '-')}.log"


def build_wheel(work: Path) -> Path:
    """`python -m build`, with the build package in an environment of its own."""
    run([sys.executable, "-m", "venv", str(work / "builder")], work / "build.log")
    python = str(work / "builder" / "bin" / "python")
    run([python, "-m", "pip", "install", "--progress-bar", "off", "build"], work / "build.log")
    run([python, "-m", "build", "--outdir", str(work / "dist"), str(ROOT)], work / "build.log")
    (wheel,) = (work / "dist").glob("*.whl")
    return wheel


def install(work: Path, wheel: Path, torch_index: str) -> Path:
    """A new environment with the wheel and [cpu], as README.md installs it."""
    environment = work / "venv"
    run([sys.executable, "-m", "venv", str(environment)], work / "install.log")
    index = ["--extra-index-url", torch_index] if torch_index else []
    pip = [str(environment / "bin" / "pip"), "install", "--progress-bar", "off"]
    run([*pip, f"{wheel}[cpu]", *index], work / "install.log", cwd=work)
    return environment


def check(user: User, serve_options: Sequence[str]) -> None:
    """README.md's commands in its order. Raises CheckFailed."""
    user.run(["mcmoe", "doctor"], exit_code=1, contains="Run `mcmoe doctor --mend`.")
    user.run(["mcmoe", "doctor", "--mend"], contains="This environment can serve.")
    user.run(["mcmoe", "doctor"], contains="This environment can serve.")
    user.run(["mcmoe", "demo"], contains="prompts answered over HTTP")
    shutil.copy(REFERENCE / "corpus" / "scripture.evaluation.txt", user.directory / "wiki.txt")
    with running_hub() as hub:
        hub.add(NAME, REFERENCE / "tiny-mixtral")
        user.variables["HF_ENDPOINT"] = hub.url
        user.run(["mcmoe", "inspect", NAME])
        user.run(["mcmoe", "plan-resources", NAME, "--bits", "2.5"])
        if hub.fetched("model.safetensors"):
            raise CheckFailed("inspect or plan-resources have downloaded weights")
        user.run(["mcmoe", "quantize", NAME, OUT, "--bits", "2.5"], contains=f"Wrote {OUT}.")
        user.run(["mcmoe", "inspect", OUT])
        user.run(["mcmoe", "report", OUT])
        scores = user.run(["mcmoe", "evaluate", OUT, "--against", NAME, "--data", "wiki.txt", "--json"])
        found = re.search(r'"mean_kl": ([\d.e-]+)', scores)
        if found is None or not 0 < float(found[1]) < LARGEST_KL:
            raise CheckFailed(f"evaluate gives no KL between 0 and {LARGEST_KL}: {found and found[1]}")
        print(f"    KL {float(found[1]):.4f} nats per token", flush=True)
        with serving(user, serve_options) as url:
            ask(url)
            served = ["mcmoe", "evaluate", f"{url}/v1", "--against", NAME, "--data", "wiki.txt", "--length", "256"]
            user.run(served, contains="perplexity")


@contextmanager
def serving(user: User, options: Sequence[str]) -> Iterator[str]:
    """`vllm serve OUT` until the block ends; yields http://HOST:PORT. Raises CheckFailed where it does not come up."""
    command = ["vllm", "serve", OUT, *options]
    log = user.new_log(command)
    print(f"$ {' '.join(command)}", flush=True)
    began = time.monotonic()
    program = [str(user.bin / command[0]), *command[1:]]
    try:
        with running(program, log_file=log, environment=user.variables, directory=user.directory) as url:
            print(f"    answers after {time.monotonic() - began:.0f} s", flush=True)
            if "vllm-mcmoe" not in log.read_text(errors="replace"):
                raise CheckFailed(f"the server does not say that the plugin loaded the experts: {log}")
            yield url
    except McmoeError as error:
        raise CheckFailed(f"`{' '.join(command)}` has not come up: {log}: {error}") from error


def ask(url: str) -> None:
    """A completion of the quantised model. Raises CheckFailed where it says nothing."""
    question = {"model": OUT, "prompt": PROMPT, "max_tokens": 16, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(question).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        text = json.load(answer)["choices"][0]["text"]
    print(f"    {PROMPT!r} goes on {text!r}", flush=True)
    if not text.strip():
        raise CheckFailed(f"the server completes {PROMPT!r} with nothing")


def run(
    command: Sequence[str],
    log: Path,
    exit_code: int = 0,
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> None:
    """Run a command with its output appended to a log. Raises CheckFailed where it ends with another exit code.

    env, cwd: None takes this process's, without what leads Python to other packages, such as the checkout's.
    """
    print(f"$ {' '.join(command)}", flush=True)
    began = time.monotonic()
    if env is None:
        env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    program = shutil.which(command[0], path=env["PATH"])
    if program is None:
        raise CheckFailed(f"there is no {command[0]} on {env['PATH']}")
    with open(log, "ab") as output:
        done = subprocess.run([program, *command[1:]], stdout=output, stderr=subprocess.STDOUT, env=env, cwd=cwd)
    print(f"    {time.monotonic() - began:.0f} s", flush=True)
    if done.returncode != exit_code:
        raise CheckFailed(f"`{' '.join(command)}` ended with {done.returncode}, not {exit_code}: {log}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, help="instead of building one")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "release-check", help="directory to create")
    parser.add_argument("--keep", action="store_true", help="leave --work as it is when all is well")
    parser.add_argument("--torch-index", default=CPU_TORCH, help="where torch's builds for CPUs are (%(default)s)")
    parser.add_argument(
        "--serve-options", type=shlex.split, default=[], help='of vllm serve: "--gpu-memory-utilization 0.5"'
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
