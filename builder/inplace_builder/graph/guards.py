"""Name the model's line that fixes an extent which varies.

torch.export assumes what a model's code asks of an extent, such as whether there is more than one
token. If what it assumed does not hold for every value, it fails, and names the extent only.
"""

import contextlib
import linecache
import re
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import inplace
import sympy
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

MAX_VALUES = 64
"""Values of an extent that are tried, beside its largest one."""

MAX_NAMED = 2
"""Lines that an error names."""

_EXPORT = f"{Path(str(torch.__file__)).parent}/export/"
"""The folder of torch.export: what calls it is no model's line either."""

_FOREIGN = tuple(
    f"{folder}/"
    for folder in (
        Path(str(torch.__file__)).parent,
        Path(inplace.__file__).parent,
        Path(__file__).parents[1],
    )
)
"""The folders of files that are no model's."""

_STANDARD = f"{sysconfig.get_path('stdlib')}/"
"""The folder of Python's own files; packages may be in it."""


class ExtentError(Exception):
    """A model's code fixes an extent that varies."""


@dataclass(frozen=True)
class Assumption:
    """What an export assumed of one extent.

    Attributes:
        condition: for example ``input_ids.shape[0] != 1``.
        minimum, maximum: the values that the extent may have; no maximum if None.
        line: the model's, as `inplace_builder.graph.nodes.source_line` gives it.
    """

    condition: str
    minimum: int
    maximum: int | None
    line: str


@contextlib.contextmanager
def named_extents() -> Iterator[None]:
    """Let an export that fails because an extent does not vary name the lines of the model.

    Raises:
        ExtentError: the export made an assumption that does not hold for every value of an extent.
    """
    assumptions: dict[Assumption, None] = {}
    original: Any = ShapeEnv._log_guard

    def noted(env: ShapeEnv, prefix: str, guard: Any, forcing_spec: bool) -> None:
        if prefix == "eval" and (assumption := _assumption(env, guard, sys._getframe(1))):
            assumptions[assumption] = None
        original(env, prefix, guard, forcing_spec)

    environment: Any = ShapeEnv
    environment._log_guard = noted
    try:
        yield
    except Exception as error:
        if not assumptions or "Constraints violated" not in str(error):
            raise
        raise ExtentError(_text(list(assumptions))) from error
    finally:
        environment._log_guard = original


def _assumption(env: ShapeEnv, guard: Any, frame: FrameType | None) -> Assumption | None:
    """What a guard on one extent assumes; None if it always holds, or if no model asks it."""
    if len(guard.free_symbols) != 1 or not (line := model_line(frame)):
        return None
    (symbol,) = guard.free_symbols
    limits = env.var_to_range[symbol]
    minimum = int(limits.lower) if limits.lower.is_Integer else 0
    maximum = int(limits.upper) if limits.upper.is_Integer else None
    end = min(minimum + MAX_VALUES, minimum + MAX_VALUES if maximum is None else maximum)
    tried = [*range(minimum, end + 1), *([] if maximum is None else [maximum])]
    if all(guard.subs(symbol, value) == sympy.true for value in tried):
        return None
    sources = env.var_to_sources.get(symbol)
    name = _extent_name(sources[0].name) if sources else str(symbol)
    named = guard.subs(symbol, sympy.Symbol(name, integer=True))
    relation = getattr(named, "rel_op", None)
    condition = f"{named.lhs} {relation} {named.rhs}" if relation else str(named)
    return Assumption(condition, minimum, maximum, line)


def _extent_name(source: str) -> str:
    """``input_ids.shape[0]`` for ``L['input_ids'].size()[0]``."""
    source = re.sub(r"^L\['(\w+)'\]", r"\1", source)
    return source.replace(".size()", ".shape")


def model_line(frame: FrameType | None) -> str:
    """The innermost line outside PyTorch and this project; empty if there is none."""
    while frame is not None:
        code, number = frame.f_code, frame.f_lineno
        file = code.co_filename
        if file.startswith(_EXPORT):
            return ""
        if not file.startswith((*_FOREIGN, "<")) and not _is_standard(file):
            text = linecache.getline(file, number).strip()
            return f' at "{file}", line {number}, in {code.co_name} ({text})'
        frame = frame.f_back
    return ""


def failing_line(error: BaseException) -> str:
    """The innermost line outside PyTorch and this project that was running when an error came."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return model_line(trace.tb_frame) if trace is not None else ""


def _is_standard(file: str) -> bool:
    return file.startswith(_STANDARD) and "-packages" not in file.removeprefix(_STANDARD)


def _text(assumptions: list[Assumption]) -> str:
    named = " and ".join(f"{each.condition}{each.line}" for each in assumptions[:MAX_NAMED])
    first, more = assumptions[0], len(assumptions) - MAX_NAMED
    values = f"{first.minimum} or more" if first.maximum is None else f"up to {first.maximum}"
    return (
        f"the graph would be right only for {named}{f' and {more} more' if more > 0 else ''}; the "
        f"extent varies ({values}), so the line must do the same for every value"
    )
