"""A vLLM OpenAI-compatible server on localhost as a context manager, for the demo and the HTTP tests."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from vllm_mcmoe.errors import McmoeError

# A small machine: vLLM would otherwise reserve a fraction of all memory for the KV cache.
SMALL_MACHINE_OPTIONS = ("--kv-cache-memory-bytes", str(64 << 20), "--gpu-memory-utilization", "0.05")
STARTUP_SECONDS = 600  # eager start-up takes 40-90 s on two cores, a first compile another 60 s


def free_port() -> int:
    """A TCP port on localhost that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serve(
    model: Path,
    options: Sequence[str] = (),
    *,
    log_file: Path,
    environment: dict[str, str] | None = None,
    on_wait: Callable[[], None] = lambda: None,
) -> Iterator[str]:
    """Run `vllm serve MODEL OPTIONS` until the block ends; yields the base URL, `http://127.0.0.1:PORT/v1`.

    log_file receives the server's output. Raises McmoeError with the log's last lines where it does not come up.
    """
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(model), "--host", "127.0.0.1"]
    command += [*SMALL_MACHINE_OPTIONS, *options]
    variables = {**os.environ, **(environment or {})}
    with running(command, log_file=log_file, environment=variables, on_wait=on_wait) as url:
        yield f"{url}/v1"


@contextmanager
def running(
    command: Sequence[str],
    *,
    log_file: Path,
    environment: Mapping[str, str],
    directory: Path | None = None,
    on_wait: Callable[[], None] = lambda: None,
) -> Iterator[str]:
    """Run this `vllm serve ...` on a free port until the block ends; yields `http://127.0.0.1:PORT`.

    environment: all of its variables; directory: where it runs, None for here. Raises as serve does.
    """
    port = free_port()
    with open(log_file, "wb") as log:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=directory,
            start_new_session=True,  # so that _stop reaches the engine's processes, too
        )
        try:
            _wait_until_healthy(process, port, log_file, on_wait)
            yield f"http://127.0.0.1:{port}"
        finally:
            _stop(process)


def _wait_until_healthy(process: subprocess.Popen, port: int, log_file: Path, on_wait: Callable[[], None]) -> None:
    deadline = time.monotonic() + STARTUP_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise McmoeError(f"vllm serve ended with exit code {process.returncode}:\n{_tail(log_file)}")
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            on_wait()
            time.sleep(0.5)
    raise McmoeError(f"vllm serve was not ready after {STARTUP_SECONDS} s:\n{_tail(log_file)}")


def _stop(process: subprocess.Popen) -> None:
    """Ask the server to end; then end what is left of it and its engine, which would keep the model in memory."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=30)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _tail(log_file: Path, lines: int = 30) -> str:
    return "\n".join(log_file.read_text(errors="replace").splitlines()[-lines:])
