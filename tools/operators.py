"""Write docs/operators.md: what of ATen is lowered to TensorRT, from the registry of converters.

python tools/operators.py            writes it
python tools/operators.py --check    fails if it is not current
"""

import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import inplace.operators  # noqa: F401  registers the operators that converters are for
import inplace_builder.lower  # noqa: F401  registers the converters
import torch
from inplace_builder.graph.decomposition import find_decomposition
from inplace_builder.lower.complex_numbers import complex_operators
from inplace_builder.lower.own_decompositions import OWN as DECOMPOSED
from inplace_builder.lower.registry import Converter, find_converter, registered, unsupported_reason

PAGE = Path(__file__).parents[1] / "docs" / "operators.md"

HEAD = """\
# Operators that are lowered to TensorRT

Made by `make tables` from the registry of converters; do not edit.

An operator with a converter becomes layers of a network. In-place operators become functional ones
first, also on views. An operator without a converter is replaced by PyTorch's decomposition of it,
until every operator has one; what remains is refused in one error that names all of it with the
model's lines. A converter refuses what the column "only" excludes.
"""

OWN = """\
`grouped_linear` and `weighted_sum` are what a captured decoder calls for a mixture of experts;
fusion makes the others, and `linear` is also what its layers with weights in fp8 call. They are
plugins but for `weighted_sum`, which becomes layers.
"""

COMPLEX = """\
TensorRT has no complex numbers. A complex tensor becomes two real ones, its parts, where only these
operators use it, or others that PyTorch decomposes into them. Inputs, outputs and states stay real.
"""

HANDLED = ("sym_size", "sym_numel", "sym_stride", "sym_storage_offset")
"""Operators whose results are extents, which need no converter."""


def core() -> list[Any]:
    """Every operator that PyTorch tags as core ATen, without variants that write an output."""
    names = {  # of all that are registered; an attribute of `torch.ops.aten` is made at its use
        name.removeprefix("aten::").partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("aten::")
    }
    packets = [getattr(torch.ops.aten, name) for name in sorted(names)]
    overloads = [getattr(packet, name) for packet in packets for name in packet.overloads()]
    return [
        each for each in overloads if torch.Tag.core in each.tags and not each._schema.is_mutable
    ]


def sentence(function: Callable[..., Any] | None) -> str:
    """The first line of a docstring, for a table."""
    lines = ((function and function.__doc__) or "").strip().splitlines() or [""]
    return lines[0].rstrip(".").replace("|", "\\|")


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def name(overload: Any) -> str:
    """The operator's name in a table."""
    text = str(overload).removesuffix(".default")
    return f"`{text.replace('inplace.', 'inplace::')}`"


def _converter(overload: Any) -> Converter:
    converter = find_converter(overload)
    assert converter is not None
    return converter


def arguments(overload: Any) -> str:
    """The schema of an operator, without its name."""
    return str(overload._schema).partition("(")[2].partition(") ->")[0]


def page() -> str:
    """The text of the page."""
    tagged = [each for each in core() if each._schema.name.partition("::")[2] not in HANDLED]
    own = sorted((each for each in registered() if each.namespace == "aten"), key=str)
    converted = []
    for overload in own:
        mark = "core" if torch.Tag.core in overload.tags else ""
        only = sentence(_converter(overload).validator)
        converted.append((name(overload), mark, sentence(_converter(overload).convert), only))
    inplace_own = sorted((each for each in registered() if each.namespace == "inplace"), key=str)
    converted_or_complex = registered() | complex_operators()
    rest = [each for each in tagged if each not in converted_or_complex]
    refused = [each for each in rest if unsupported_reason(each) is not None]
    decomposed = [
        each
        for each in rest
        if each not in refused and (each in DECOMPOSED or find_decomposition(each) is not None)
    ]
    missing = [each for each in rest if each not in refused and each not in decomposed]
    parts = [
        HEAD,
        f"Of {len(tagged)} operators of core ATen {len(tagged) - len(rest)} have a converter, "
        f"{len(decomposed)} are decomposed,\n{len(refused)} cannot be expressed, "
        f"{len(missing)} missing.\n",
        f"## With a converter ({len(own)})\n",
        table(("operator", "", "computes", "only"), converted),
        "## Operators of this project without states\n",
        OWN,
        table(
            ("operator", "computes", "arguments"),
            [
                (name(each), sentence(_converter(each).convert), f"`{arguments(each)}`")
                for each in inplace_own
            ],
        ),
        "## On complex numbers\n",
        COMPLEX,
        textwrap.fill(", ".join(sorted(map(name, complex_operators()))), 100) + "\n",
        "## Core ATen that is decomposed\n",
        "".join(f"- {name(each)}\n" for each in decomposed),
        "## Core ATen that TensorRT cannot express\n",
        table(
            ("operator", "why"),
            [(name(each), str(unsupported_reason(each))) for each in refused],
        ),
    ]
    if missing:
        parts += [
            "## Core ATen that is missing\n",
            "".join(f"- {name(each)}\n" for each in missing),
        ]
    return "\n".join(parts)


def main() -> int:
    """Write the page, or check it."""
    text = page()
    if "--check" in sys.argv[1:]:
        if PAGE.read_text() == text:
            return 0
        print(f"{PAGE} is not current: run `make tables`", file=sys.stderr)
        return 1
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
