"""The backend's log lines in tritonserver's own log.

A line costs up to 0.3 ms (measured on 2 cores), so a thread of its own writes them.
"""

import logging
import queue
from collections.abc import Callable, Mapping
from logging.handlers import QueueHandler, QueueListener

import triton_python_backend_utils as pb_utils

log = logging.getLogger("inplace")


class _TritonHandler(logging.Handler):
    """Writes log records into the server's log, at their level.

    DEBUG records become INFO, which the server shows by default: `Settings.log_level` has already
    filtered them.
    """

    def __init__(self, instance: str) -> None:
        super().__init__()
        self.instance = instance
        logger = pb_utils.Logger
        self.levels: dict[int, Callable[[str], None]] = {
            logging.ERROR: logger.log_error,
            logging.WARNING: logger.log_warn,
        }

    def emit(self, record: logging.LogRecord) -> None:
        write = next(
            (write for level, write in self.levels.items() if record.levelno >= level),
            pb_utils.Logger.log_info,
        )
        write(f"inplace {self.instance}: {self.format(record)}")


def instance_gpu(args: Mapping[str, str]) -> int | None:
    """The GPU that Triton names for a model instance; None for one on the CPU.

    Args:
        args: what Triton passes to ``initialize``.
    """
    if args.get("model_instance_kind") != "GPU":
        return None
    return int(args["model_instance_device_id"])


def instance_title(args: Mapping[str, str]) -> str:
    """What log lines call a model instance; Triton gives those of several GPUs one name."""
    gpu = instance_gpu(args)
    return args["model_instance_name"] + ("" if gpu is None else f" GPU {gpu}")


def log_to_triton(instance: str) -> QueueListener:
    """Send the log ``inplace`` to the server's log.

    Args:
        instance: names the model instance (`instance_title`); it begins each line.

    Returns:
        The listener; its ``stop`` waits until everything is written.
    """
    records: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    listener = QueueListener(records, _TritonHandler(instance))
    listener.start()
    log.handlers = [QueueHandler(records)]
    log.setLevel(logging.INFO)
    log.propagate = False
    return listener
