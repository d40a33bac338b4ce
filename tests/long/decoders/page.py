"""The page docs/models.md, from the results of the survey."""

import json
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
PAGE, RESULTS = ROOT / "docs" / "models.md", ROOT / "benchmarks" / "results" / "models.json"

HEAD = """\
# Decoders of transformers

Made by `make models`; do not edit. `tests/long/decoders/configs.py` has a configuration for each
model type of `MODEL_FOR_CAUSAL_LM_MAPPING_NAMES` whose stock `generate` runs on tiny random
weights, and for variants of it that published checkpoints use.

*equal*: 24 tokens generated from three prompts of different lengths, together, are those of
`generate`, and so are the logits (within 1e-3 of the largest); all prompts go past every window.
They are fed in chunks of 8 tokens, or whole where tokens see later ones that are fed with them.
*CPU*: the model is saved, built with the PyTorch engine and run without a server.
*TensorRT*: the network is defined through TensorRT-RTX's API and computed by an interpreter that
reads it back; no GPU takes part.
"""


def page(record: Mapping[str, Any]) -> str:
    """The text of the page.

    Args:
        record: facts of the run; ``models`` with the result of each configuration that ran;
            ``without_result``, the names of the others; ``without_generate`` and ``forward`` of
            `decoders.configs`.
    """
    models: dict[str, dict[str, Any]] = record["models"]
    rows = {name: each for name, each in models.items() if each.get("generate") == "ok"}
    lines = [
        f"| `{name}`{_mark(row)} | {_cell(row, 'cpu')} | {_cell(row, 'tensorrt')} |"
        for name, row in rows.items()
    ]
    excluded = record["without_generate"] | {
        name: each["generate"] for name, each in models.items() if name not in rows
    }
    reasons = [f"| `{name}` | {_escape(reason)} |" for name, reason in excluded.items()]
    parts = [
        HEAD,
        _counts(record, rows),
        "| model | CPU | TensorRT |\n| --- | --- | --- |\n" + "\n".join(lines) + "\n",
        _forward(record["forward"], rows),
        f"## Left out ({len(excluded)})\n",
        "| model | `generate` alone on token ids |\n| --- | --- |\n" + "\n".join(reasons) + "\n",
    ]
    if missing := record["without_result"]:
        names = ", ".join(f"`{name}`" for name in missing)
        text = _filled(f"These have not run yet: {names}.")
        parts += [f"## Without result ({len(missing)})\n", f"{text}\n"]
    return "\n".join(part for part in parts if part)


def _counts(record: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]]) -> str:
    models: Mapping[str, Mapping[str, Any]] = record["models"]
    ran, missing = len(models), len(record["without_result"])
    cpu = {name for name, row in rows.items() if row.get("cpu") == "equal"}
    tensorrt = {name for name, row in rows.items() if row.get("tensorrt") == "equal"}
    commits = sorted({each["commit"] for each in models.values()})
    versions = record["versions"]
    several = " in several runs" if len(commits) > 1 else ""
    unfinished = "" if not missing else f" and {missing} have no result yet"
    counts = (
        f"Of {ran + missing} configurations {ran} ran{unfinished}. {len(rows)} of those that ran "
        f"have a reference to compare with: {len(cpu & tensorrt)} are equal on both engines, "
        f"{len(cpu - tensorrt)} with the PyTorch engine only, {len(tensorrt - cpu)} as a TensorRT "
        f"network only, {len(rows) - len(cpu | tensorrt)} on neither."
    )
    origin = (
        f"transformers {versions['transformers']}, PyTorch {versions['torch']}; "
        f"{record['date'][:10]}, `{record['command']}`{several} at {', '.join(commits)} "
        f"(`benchmarks/results/models.json` has each row's; + is with uncommitted changes)."
    )
    return "\n\n".join(_filled(each) for each in (counts, origin)) + "\n"


def _forward(reasons: Mapping[str, str], rows: Mapping[str, Mapping[str, Any]]) -> str:
    marked = [f"`{name}`: {reasons[name]}" for name, row in rows.items() if _mark(row)]
    if not marked:
        return ""
    return (
        _filled(
            "† The reference is greedy decoding by the model's forward over all tokens, without a "
            f"cache, from which its `generate` differs. {'; '.join(marked)}."
        )
        + "\n"
    )


def _filled(paragraph: str) -> str:
    return textwrap.fill(paragraph, 100, break_long_words=False, break_on_hyphens=False)


def _mark(row: Mapping[str, Any]) -> str:
    return " †" if row.get("reference") == "forward" else ""


def _cell(row: Mapping[str, Any], engine: str) -> str:
    return _escape(str(row[engine]))


def _escape(text: str) -> str:
    short = text if len(text) <= 240 else text[:237] + "…"
    return short.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def main() -> int:
    """Write the page, or check it: ``PYTHONPATH=tests/long python -m decoders.page [--check]``."""
    text = page(json.loads(RESULTS.read_text()))
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(text)
    elif PAGE.read_text() != text:
        print(f"{PAGE} is not that of {RESULTS}: run `make models`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
