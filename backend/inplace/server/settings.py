"""What an operator may set in ``config.pbtxt`` for one deployment."""

import json
import logging
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

from inplace.errors import LoadError
from inplace.schema.served import Manifest

SERVE = "serve"


IDLE_TIMEOUT = "idle_timeout_seconds"


LOG_LEVEL = "log_level"


EOS = "eos_token_ids"


QUEUE = "generation_queue"


CAPACITY = "capacity"


KNOWN = (SERVE, IDLE_TIMEOUT, LOG_LEVEL, EOS, QUEUE, CAPACITY)


TRITON_IDLE_MICROSECONDS = 1_000_000
"""``max_sequence_idle_microseconds`` where config.pbtxt says nothing (Triton's model_config.proto)."""


MAX_WAITING = 256
"""Generations that may wait for a slot where config.pbtxt says nothing."""


Serve = Literal["step", "stream", "front"]


LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


@dataclass(frozen=True)
class Settings:
    """The deployment's settings.

    Attributes:
        idle_timeout: seconds after its last response at which a sequence loses its slot.
        serve: the protocol: ``step``, or ``stream`` with generations beside steps.
        eos: tokens that end a generation.
        most_waiting: generations that may wait for a slot.
        capacity: positions a sequence may hold, for an engine that was built for a range of them; None is the most.
        log_level: the least level of a log record that reaches the server's log.
        notes: what was not taken as it was written, for the log.
    """

    idle_timeout: float
    serve: Serve = "step"
    eos: frozenset[int] = frozenset()
    max_waiting: int = MAX_WAITING
    capacity: int | None = None
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
            raise LoadError(
                "config.pbtxt has no sequence_batching: this backend serves sequences; build the model again to restore it"
            )
        _check_known(config)
        serve = served(model_config)
        decoupled = config.get("model_transaction_policy", {}).get("decoupled", False)
        if decoupled != (serve == "stream"):
            raise LoadError(
                f"config.pbtxt says decoupled: {str(decoupled).lower()} and {SERVE}: {serve}; stream models are decoupled, others are not: "
                f"build the model again to restore it"
            )
        most = manifest.program("step").max_rows
        if not 1 <= config["max_batch_size"] <= most:
            raise LoadError(
                f"config.pbtxt has max_batch_size {config['max_batch_size']}, the engine was built for 1 to {most} rows a step"
            )
        level = _parameter(config, LOG_LEVEL, "info")
        if level not in LEVELS:
            raise LoadError(
                f"config.pbtxt: parameter {LOG_LEVEL} is {level!r}; expected one of {list(LEVELS)}"
            )
        idle, notes = _idle(config, serve)
        waiting, capacity = (_one(config, name) for name in (QUEUE, CAPACITY))
        return cls(
            idle,
            serve,
            frozenset(_whole(config, EOS)),
            max_waiting=MAX_WAITING if waiting is None else waiting,
            capacity=capacity,
            log_level=LEVELS[level],
            notes=notes,
        )


def served(model_config: str) -> Serve:
    """The protocol that a model configuration names; ``step`` where it names none.

    Raises:
        LoadError: there is no such protocol.
    """
    found = _parameter(json.loads(model_config), SERVE, "step")
    if found not in get_args(Serve):
        raise LoadError(
            f"config.pbtxt: parameter {SERVE} is {found!r}; expected one of {list(get_args(Serve))}"
        )
    serve: Serve = found  # type: ignore[assignment]  # it is one of them
    return serve


def _parameter(config: dict[str, Any], name: str, default: str) -> str:
    text: str = config.get("parameters", {}).get(name, {}).get("string_value", default)
    return text


def _whole(config: dict[str, Any], name: str) -> list[int]:
    """The whole numbers of a parameter, separated by commas."""
    text = _parameter(config, name, "")
    parts = text.split(",") if text else []
    if not all(part.strip().isascii() and part.strip().isdigit() for part in parts):
        raise LoadError(
            f"config.pbtxt: parameter {name} is {text!r}; expected whole numbers of at least 0, separated by commas"
        )
    return [int(part) for part in parts]


def _one(config: dict[str, Any], name: str) -> int | None:
    """A parameter that is one whole number; None where it is not set."""
    found = _whole(config, name)
    if len(found) > 1:
        raise LoadError(
            f"config.pbtxt: parameter {name} is {_parameter(config, name, '')!r}; expected one whole number of at least 0"
        )
    return found[0] if found else None


def _check_known(config: dict[str, Any]) -> None:
    """A misspelt parameter would be one that is not set. Names in capitals are the Python backend's own."""
    if unknown := sorted(
        name for name in config.get("parameters", {}) if name not in KNOWN and not name.isupper()
    ):
        raise LoadError(
            f"config.pbtxt has the parameters {unknown}, which this backend does not know; it takes {list(KNOWN)}"
        )


def _idle(config: dict[str, Any], serve: Serve) -> tuple[float, tuple[str, ...]]:
    """Seconds of the idle timeout, and what was not taken as written.

    Triton's own clock runs while a generation does, so a stream model gives it longer than this one.
    """
    triton_idle = (
        int(config["sequence_batching"].get("max_sequence_idle_microseconds", 0))
        or TRITON_IDLE_MICROSECONDS
    )
    text = _parameter(config, IDLE_TIMEOUT, "600")
    try:
        idle = float(text)
    except ValueError:
        idle = float("nan")
    if not 0 < idle < float("inf"):
        raise LoadError(
            f"config.pbtxt: parameter {IDLE_TIMEOUT} is {text!r}; expected a number of seconds above 0"
        )
    if serve == "stream" or idle >= triton_idle / 1e6:
        return idle, ()
    note = f"{IDLE_TIMEOUT} {idle:g} is below Triton's own max_sequence_idle_microseconds {triton_idle}; using {triton_idle / 1e6:g} s"
    return triton_idle / 1e6, (note,)
