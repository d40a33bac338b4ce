"""What an operator may set in ``config.pbtxt`` for one deployment."""

import json
import logging
from dataclasses import dataclass
from typing import Any, Self

from inplace.errors import LoadError
from inplace.manifest import Manifest

IDLE_TIMEOUT = "idle_timeout_seconds"
LOG_LEVEL = "log_level"
TRITON_IDLE_MICROSECONDS = 1_000_000
"""``max_sequence_idle_microseconds`` where config.pbtxt says nothing (Triton's model_config.proto)."""

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


@dataclass(frozen=True)
class Settings:
    """The deployment's settings.

    Attributes:
        idle_timeout: seconds after its last response at which a sequence loses its slot.
        log_level: the least level of a log record that reaches the server's log.
        notes: what was not taken as it was written, for the log.
    """

    idle_timeout: float
    log_level: int = logging.INFO
    notes: tuple[str, ...] = ()

    @classmethod
    def parse(cls, model_config: str, manifest: Manifest) -> Self:
        """Read them from the model configuration that Triton hands over (JSON), and check it against the engine.

        Raises:
            LoadError: a setting that cannot be, or a configuration that the engine cannot serve.
        """
        config: dict[str, Any] = json.loads(model_config)
        if "sequence_batching" not in config:
            raise LoadError("config.pbtxt has no sequence_batching: this backend serves sequences; build the model again to restore it")
        if config.get("model_transaction_policy", {}).get("decoupled", False):
            raise LoadError("config.pbtxt says decoupled: this engine was built for the step protocol; build the model again to restore it")
        most = manifest.program("step").max_rows
        if not 1 <= config["max_batch_size"] <= most:
            raise LoadError(f"config.pbtxt has max_batch_size {config['max_batch_size']}, the engine was built for 1 to {most} rows a step")
        level = config.get("parameters", {}).get(LOG_LEVEL, {}).get("string_value", "info")
        if level not in LEVELS:
            raise LoadError(f"config.pbtxt: parameter {LOG_LEVEL} is {level!r}; expected one of {list(LEVELS)}")
        triton_idle = int(config["sequence_batching"].get("max_sequence_idle_microseconds", 0)) or TRITON_IDLE_MICROSECONDS
        text = config.get("parameters", {}).get(IDLE_TIMEOUT, {}).get("string_value", "600")
        try:
            idle = float(text)
        except ValueError:
            idle = float("nan")
        if not 0 < idle < float("inf"):
            raise LoadError(f"config.pbtxt: parameter {IDLE_TIMEOUT} is {text!r}; expected a number of seconds above 0")
        if idle < triton_idle / 1e6:
            note = (
                f"{IDLE_TIMEOUT} {idle:g} is below Triton's own max_sequence_idle_microseconds {triton_idle}; using {triton_idle / 1e6:g} s"
            )
            return cls(triton_idle / 1e6, LEVELS[level], (note,))
        return cls(idle, LEVELS[level])
