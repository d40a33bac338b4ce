"""Write the list of request parameters in docs/protocol.md from the registry.

Usage: python tools/parameter_table.py [--check]. With --check nothing is written, and the exit
status is 1 if the page has another list.
"""

import re
import sys
import textwrap
from pathlib import Path

from inplace.parameters import REGISTRY, ParameterSpec, RequestKind

PAGE = Path(__file__).parents[1] / "docs" / "protocol.md"
BEGIN, END = "<!-- parameters: written by tools/parameter_table.py -->", "<!-- end -->"


KINDS = {
    RequestKind.STEP: "step",
    RequestKind.GENERATION: "generation",
    RequestKind.FETCH: "fetch",
    RequestKind.END: "END",
    RequestKind.PROXY: "HTTP generate",
}


def table() -> str:
    """An entry for each parameter, in Markdown."""
    return "\n".join(_entry(spec) for spec in REGISTRY)


def page_with_table(page: str) -> str:
    """The page with the list of today's registry.

    Raises:
        ValueError: the page has no place for it.
    """
    pattern = re.compile(f"{re.escape(BEGIN)}\n.*?{re.escape(END)}", re.DOTALL)
    page, count = pattern.subn(lambda _: f"{BEGIN}\n\n{table()}\n\n{END}", page)
    if count != 1:
        raise ValueError(f"{PAGE} must have {BEGIN!r} and {END!r} once")
    return page


def _entry(spec: ParameterSpec) -> str:
    kinds = ", ".join(name for kind, name in KINDS.items() if kind in spec.kinds)
    default = "" if spec.default is None else f"; `{str(spec.default).lower()}` if absent"
    limits = spec.limits[0].upper() + spec.limits[1:]
    return _filled(f"- `{spec.name}` ({kinds}): {limits}{default}. {spec.description}")


def _filled(text: str) -> str:
    indent = "  " if text.startswith("- ") else ""
    return textwrap.fill(
        text, 100, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def main() -> int:
    """Write or check; the exit status."""
    old = PAGE.read_text()
    new = page_with_table(old)
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(new)
    elif new != old:
        print(f"{PAGE} has another list than the registry: run `make tables`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
