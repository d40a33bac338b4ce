"""What an operator may set in ``config.pbtxt`` for one deployment.

It imports little, so that `inplace.alive` starts quickly.
"""

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

from inplace.errors import LoadError
from inplace.protocol import (
    CHUNK_SAMPLES,
    POSITIONS,
    PREFIX_REUSE,
    PREFIX_WITHOUT_KEY,
    SAMPLE_RATE,
    SNAPSHOT_EVERY,
    SNAPSHOT_STORE,
    WINDOW_SAMPLES,
)
from inplace.schema.prefixes import PrefixOptions
from inplace.schema.snapshots import SnapshotOptions

if TYPE_CHECKING:
    from inplace.schema.served import Manifest

SERVE = "serve"
"""The parameter with the protocol of a model (`ServeMode`)."""


IDLE_TIMEOUT = "idle_timeout_seconds"
"""The parameter with the time after which an idle sequence loses its slot."""


LOG_LEVEL = "log_level"
"""The parameter with the lowest level of the log records that reach the server's log."""


EOS = "eos_token_ids"
"""The parameter with the token ids that end a generation, separated by commas."""


QUEUE = "generation_queue"
"""The parameter with the number of requests that may wait for a slot."""


CAPACITY = "capacity"
"""The parameter with the positions of a sequence, for engines built for a range of capacities."""


CALL_ROWS = "call_rows"
"""The parameter with the most rows of a call, by program of a schedule: ``encode=4,decode=64``."""


LOOP_CALLS = "loop_calls"
"""The parameter with the most calls of a loop of a schedule that are made without asking the host
in between."""


FORWARDED_HEADERS = "forwarded_headers"
"""The parameter with a regular expression for the headers that the server forwards as parameters of
requests: what ``--http-header-forward-pattern`` and ``--grpc-header-forward-pattern`` have."""


SHARE_ENGINE = "share_engine"
"""The parameter, ``on`` or ``off``, that lets the instances of a group use the engine of the first,
which has weights and slots alone. The others read requests and write responses."""


PREFIX_SECONDS, PREFIX_SLOTS = "prefix_reuse_seconds", "prefix_reuse_slots"
"""The parameters with the time for which a free slot is kept with its tokens, and with the most
slots that are kept for one client."""


SNAPSHOT_SECRET, SNAPSHOT_SECONDS = "snapshot_secret_file", "snapshot_seconds"
SNAPSHOT_QUOTA = "snapshot_quota_bytes"
"""The parameters with the file of the secret that all servers of a store share, with the time for
which a snapshot may be restored, and with the bytes that the store may hold."""


PARAMETERS = (
    SERVE,
    IDLE_TIMEOUT,
    LOG_LEVEL,
    EOS,
    QUEUE,
    CAPACITY,
    CALL_ROWS,
    LOOP_CALLS,
    FORWARDED_HEADERS,
    SHARE_ENGINE,
    PREFIX_REUSE,
    PREFIX_WITHOUT_KEY,
    PREFIX_SECONDS,
    PREFIX_SLOTS,
    SNAPSHOT_STORE,
    SNAPSHOT_SECRET,
    SNAPSHOT_EVERY,
    SNAPSHOT_SECONDS,
    SNAPSHOT_QUOTA,
    POSITIONS,
    SAMPLE_RATE,
    WINDOW_SAMPLES,
    CHUNK_SAMPLES,
)


MAX_LOOP_CALLS = 256
"""The largest value of `LOOP_CALLS`."""


TRITON_IDLE_MICROSECONDS = 1_000_000
"""Triton's default of ``max_sequence_idle_microseconds`` (model_config.proto)."""


MAX_WAITING = 256
"""The default of `QUEUE`."""


ServeMode = Literal["step", "stream", "front"]
"""The protocol of a model; ``front`` is the generate proxy of a stream model."""


GENERATE_PROXY: ServeMode = "front"


LOG_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


MAX_DIGITS = 20
"""Digits of a number in a setting."""


@dataclass(frozen=True)
class Settings:
    """The settings of a deployment.

    Attributes:
        idle_timeout: seconds after its last response until a sequence loses its slot.
        serve: the protocol: ``step``, or ``stream`` with generations and steps.
        eos: token ids that end a generation.
        max_waiting: requests that may wait for a slot.
        capacity: positions of a sequence, for an engine that was built for a range of capacities;
            None is the largest.
        call_rows: by program of a schedule, most rows of a call.
        loop_calls: most calls of a program of a schedule in succession before the host reads what
            they gave; None for the engine's default.
        share_engine: whether the instances of a group use the engine of the first.
        prefixes: how prompts use what earlier ones have computed; None if they do not.
        snapshots: where sequences are stored; None if they are not.
        log_level: the lowest level of the log records that reach the server's log.
        forwarded_headers: matches the names of headers that arrive as parameters; None if the
            server forwards none.
        notes: settings that were adjusted, as texts for the log.
    """

    idle_timeout: float
    serve: ServeMode = "step"
    eos: frozenset[int] = frozenset()
    max_waiting: int = MAX_WAITING
    capacity: int | None = None
    call_rows: Mapping[str, int] = field(default_factory=dict)
    loop_calls: int | None = None
    share_engine: bool = False
    prefixes: PrefixOptions | None = None
    snapshots: SnapshotOptions | None = None
    log_level: int = logging.INFO
    forwarded_headers: re.Pattern[str] | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def parse(cls, model_config: str, manifest: "Manifest") -> Self:
        """Read the settings and check them against the engine.

        Args:
            model_config: the model configuration that Triton passes, as JSON.
            manifest: the engine's.

        Raises:
            LoadError: a setting is invalid, or the engine cannot serve this configuration.
        """
        config: dict[str, Any] = json.loads(model_config)
        if "sequence_batching" not in config:
            raise LoadError(
                "config.pbtxt has no sequence_batching: this backend serves sequences; "
                "build the model again to restore it"
            )
        _check_names(config)
        serve = serve_mode(model_config)
        decoupled = is_decoupled(config)
        if decoupled != (serve == "stream"):
            raise LoadError(
                f"config.pbtxt has decoupled: {str(decoupled).lower()} and {SERVE}: {serve}; "
                "only stream models are decoupled: build the model again to restore it"
            )
        max_rows = manifest.max_sequences
        if not 1 <= config["max_batch_size"] <= max_rows:
            raise LoadError(
                f"config.pbtxt has max_batch_size {config['max_batch_size']}, "
                f"the engine was built for 1 to {max_rows} rows a step"
            )
        eos = frozenset(_integers(config, EOS))
        vocab_size = manifest.interface.vocab_size
        if vocab_size and any(token >= vocab_size for token in eos):
            raise LoadError(
                f"config.pbtxt: parameter {EOS} is {_text(config, EOS, '')[:100]!r}; expected "
                f"token ids below {vocab_size}"
            )
        idle_timeout, notes = _idle_timeout(config, serve)
        share_engine = _switch(config, SHARE_ENGINE)
        if share_engine and not any(
            int(group.get("count", 1)) > 1 for group in config.get("instance_group", [])
        ):
            note = f"{SHARE_ENGINE} has no effect: no instance_group has a count above 1"
            notes = (*notes, note)
        max_waiting = _integer(config, QUEUE)
        return cls(
            idle_timeout,
            serve,
            eos,
            max_waiting=MAX_WAITING if max_waiting is None else max_waiting,
            capacity=_integer(config, CAPACITY),
            call_rows=_call_rows(config, manifest),
            loop_calls=_loop_calls(config, manifest),
            share_engine=share_engine,
            prefixes=_prefixes(config),
            snapshots=_snapshots(config),
            log_level=_log_level(config),
            forwarded_headers=forwarded_headers(model_config),
            notes=notes,
        )

    def is_forwarded(self, name: str) -> bool:
        """Whether a parameter of this name is a header that the server forwards."""
        return matches(self.forwarded_headers, name)


def matches(pattern: re.Pattern[str] | None, name: str) -> bool:
    """Whether a pattern of headers has this name. As in Triton, a part of the name suffices."""
    return pattern is not None and pattern.search(name) is not None


def serve_mode(model_config: str) -> ServeMode:
    """The protocol of a model configuration (JSON); ``step`` if it has none.

    Raises:
        LoadError: the protocol is unknown.
    """
    text = _text(json.loads(model_config), SERVE, "step")
    for mode in get_args(ServeMode):
        if text == mode:
            return mode  # type: ignore[no-any-return]
    raise LoadError(
        f"config.pbtxt: parameter {SERVE} is {text!r}; expected one of {list(get_args(ServeMode))}"
    )


def _text(config: dict[str, Any], name: str, default: str) -> str:
    text: str = config.get("parameters", {}).get(name, {}).get("string_value", default)
    return text


def _integers(config: dict[str, Any], name: str) -> list[int]:
    """The integers of a parameter, separated by commas."""
    text = _text(config, name, "")
    parts = text.split(",") if text else []
    if not all(
        part.strip().isascii() and part.strip().isdigit() and len(part) <= MAX_DIGITS
        for part in parts
    ):
        raise LoadError(
            f"config.pbtxt: parameter {name} is {text[:100]!r}; "
            "expected whole numbers of at least 0, separated by commas"
        )
    return [int(part) for part in parts]


def _integer(config: dict[str, Any], name: str) -> int | None:
    """A parameter that is one integer; None if it is not set."""
    values = _integers(config, name)
    if len(values) > 1:
        raise LoadError(
            f"config.pbtxt: parameter {name} is {_text(config, name, '')!r}; "
            "expected one whole number of at least 0"
        )
    return values[0] if values else None


def _call_rows(config: dict[str, Any], manifest: "Manifest") -> dict[str, int]:
    text = _text(config, CALL_ROWS, "")
    limits = {program.name: program.max_rows for program in manifest.programs}
    if not manifest.is_scheduled:
        limits = {}
    result: dict[str, int] = {}
    for part in text.split(",") if text else ():
        name, _, digits = (each.strip() for each in part.partition("="))
        rows = int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 9 else 0
        if name not in limits or not 1 <= rows <= limits[name]:
            each = ", ".join(f"{name}=1…{most}" for name, most in limits.items())
            known = f"separated by commas: {each}" if each else "for an engine with a schedule"
            raise LoadError(
                f"config.pbtxt: parameter {CALL_ROWS} is {text[:100]!r}; expected rows by program, "
                f"{known}"
            )
        result[name] = rows
    return result


def _loop_calls(config: dict[str, Any], manifest: "Manifest") -> int | None:
    calls = _integer(config, LOOP_CALLS)
    if calls is not None and not (manifest.is_scheduled and 1 <= calls <= MAX_LOOP_CALLS):
        raise LoadError(
            f"config.pbtxt: parameter {LOOP_CALLS} is {calls}; expected 1 to {MAX_LOOP_CALLS}, for "
            "an engine with a schedule of programs"
        )
    return calls


def _prefixes(config: dict[str, Any]) -> PrefixOptions | None:
    """How prefixes are reused; None if they are not."""
    without_key = _switch(config, PREFIX_WITHOUT_KEY)
    seconds = _seconds(config, PREFIX_SECONDS, PrefixOptions.seconds)
    options = PrefixOptions(seconds, _integer(config, PREFIX_SLOTS), without_key)
    return options if _switch(config, PREFIX_REUSE) else None


def _snapshots(config: dict[str, Any]) -> SnapshotOptions | None:
    """Where sequences are stored; None if they are not."""
    store, secret = _text(config, SNAPSHOT_STORE, ""), _text(config, SNAPSHOT_SECRET, "")
    others = (SNAPSHOT_SECRET, SNAPSHOT_EVERY, SNAPSHOT_SECONDS, SNAPSHOT_QUOTA)
    given = [name for name in others if _text(config, name, "")]
    if not store:
        if given:
            raise LoadError(
                f"config.pbtxt has the parameters {given} without {SNAPSHOT_STORE}: name the store"
                " of the snapshots, or leave them out"
            )
        return None
    if not secret:
        raise LoadError(
            f"config.pbtxt has {SNAPSHOT_STORE} without {SNAPSHOT_SECRET}: name a file with 32"
            " random bytes or more, the same for all servers of the store"
        )
    every, quota = _integer(config, SNAPSHOT_EVERY), _integer(config, SNAPSHOT_QUOTA)
    for name, value in ((SNAPSHOT_EVERY, every), (SNAPSHOT_QUOTA, quota)):
        if value == 0:
            raise LoadError(f"config.pbtxt: parameter {name} is 0; expected a number above 0")
    seconds = _seconds(config, SNAPSHOT_SECONDS, SnapshotOptions.seconds)
    return SnapshotOptions(store, secret, every, seconds, quota)


def _switch(config: dict[str, Any], name: str) -> bool:
    text = _text(config, name, "off")
    if text not in ("on", "off"):
        raise LoadError(f"config.pbtxt: parameter {name} is {text!r}; expected on or off")
    return text == "on"


def _seconds(config: dict[str, Any], name: str, default: float) -> float:
    text = _text(config, name, f"{default:g}")
    try:
        seconds = float(text)
    except ValueError:
        seconds = float("nan")
    if not 0 < seconds < float("inf"):
        raise LoadError(
            f"config.pbtxt: parameter {name} is {text!r}; expected a number of seconds above 0"
        )
    return seconds


def forwarded_headers(model_config: str) -> re.Pattern[str] | None:
    """The setting `FORWARDED_HEADERS` of a model configuration (JSON).

    Upper and lower case are the same in headers.

    Raises:
        LoadError: it is not a regular expression.
    """
    text = _text(json.loads(model_config), FORWARDED_HEADERS, "")
    try:
        return re.compile(text, re.IGNORECASE) if text else None
    except re.error as error:
        raise LoadError(
            f"config.pbtxt: parameter {FORWARDED_HEADERS} is {text!r}; expected a regular"
            f" expression for names of headers ({error})"
        ) from None


def _log_level(config: dict[str, Any]) -> int:
    name = _text(config, LOG_LEVEL, "info")
    if name not in LOG_LEVELS:
        raise LoadError(
            f"config.pbtxt: parameter {LOG_LEVEL} is {name!r}; expected one of {list(LOG_LEVELS)}"
        )
    return LOG_LEVELS[name]


def _check_names(config: dict[str, Any]) -> None:
    # A misspelt parameter would have no effect. Names in capitals are the Python backend's own.
    unknown = sorted(
        name
        for name in config.get("parameters", {})
        if name not in PARAMETERS and not name.isupper()
    )
    if unknown:
        raise LoadError(
            f"config.pbtxt has the parameters {unknown}, which this backend does not know; "
            f"it takes {list(PARAMETERS)}"
        )


def _idle_timeout(config: dict[str, Any], serve: ServeMode) -> tuple[float, tuple[str, ...]]:
    """The idle timeout in seconds, and a note if it was raised to Triton's own.

    Triton's idle clock runs during a generation, so it is ignored for a stream model, whose
    configuration gives it a longer time.
    """
    microseconds = int(config["sequence_batching"].get("max_sequence_idle_microseconds", 0))
    triton_idle = microseconds or TRITON_IDLE_MICROSECONDS
    idle = _seconds(config, IDLE_TIMEOUT, 600.0)
    if serve == "stream" or idle >= triton_idle / 1e6:
        return idle, ()
    note = (
        f"{IDLE_TIMEOUT} {idle:g} is below Triton's own max_sequence_idle_microseconds "
        f"{triton_idle}; using {triton_idle / 1e6:g} s"
    )
    return triton_idle / 1e6, (note,)


def is_decoupled(config: Mapping[str, Any]) -> bool:
    """Whether a model of this configuration may send several responses to a request."""
    return bool(config.get("model_transaction_policy", {}).get("decoupled", False))


def num_instances(model_config: str) -> int:
    """How many instances a model configuration (JSON) has, on all GPUs together."""
    groups = json.loads(model_config).get("instance_group", [])
    return sum(int(group.get("count", 1)) * max(1, len(group.get("gpus", []))) for group in groups)
