"""Run a check in a process of its own, which is ended when its time is over."""

import multiprocessing
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch


def within(seconds: float, check: Callable[..., object], *arguments: Any) -> None:
    """Run a check; a loop inside one call of PyTorch cannot be stopped in any other way.

    Args:
        seconds: how long it may take.
        check: called with the arguments, in a copy of this process.

    Raises:
        AssertionError: the check failed, with its traceback; or its time is over.
    """
    receiver, sender = multiprocessing.Pipe(duplex=False)
    context = multiprocessing.get_context("fork")  # imports nothing again
    process = context.Process(target=_run, args=(sender, check, arguments), daemon=True)
    begin = time.monotonic()
    process.start()
    sender.close()
    try:
        failure = receiver.recv() if receiver.poll(seconds) else f"not done after {seconds:.0f} s"
    except EOFError:
        failure = f"the process ended after {time.monotonic() - begin:.1f} s without a result"
    process.kill()
    process.join()
    receiver.close()
    assert failure is None, failure


def _run(sender: Connection, check: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)  # the threads of the parent are not in this process
    try:
        check(*arguments)
    except BaseException:
        sender.send(traceback.format_exc())
    else:
        sender.send(None)
