"""Runs of their own process, forked from a server that has imported everything once."""

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([__name__, "vllm_mcmoe.calibration.pipeline"])


def start(function: Callable[..., Any], *arguments: Any, **options: Any) -> BaseProcess:
    """A process that calls the function, which must be a module's, on one thread: sums are then in a fixed order."""
    process = _context.Process(target=_call, args=(None, function, arguments, options))
    process.start()
    return process


def result_of(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What the function returns, or the exception it raises, in a process of its own."""
    receiver, sender = _context.Pipe(duplex=False)
    process = _context.Process(target=_call, args=(sender, function, arguments, options))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        process.join()


def _call(sender: Connection | None, function: Callable[..., Any], arguments: tuple, options: dict) -> None:
    torch.set_num_threads(1)
    if sender is None:
        function(*arguments, **options)
        return
    try:
        sender.send(function(*arguments, **options))
    except BaseException as error:
        sender.send(error)
