"""The page docs/models.md, from the results of the survey."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
PAGE, RESULTS = ROOT / "docs" / "models.md", ROOT / "benchmarks" / "results" / "models.json"

HEAD = """\
# Decoders of transformers

Made by `make models`; do not edit. One row for each model type of
`MODEL_FOR_CAUSAL_LM_MAPPING_NAMES` whose stock `generate` runs on tiny random weights, and for
variants of it that published checkpoints use: the configurations are
`tests/long/decoders/configs.py`.

*equal*: 24 tokens generated from three prompts of different lengths, together, are those of
`generate`, and so are the logits (within 1e-3 of the largest); all prompts go past every window.
*CPU*: the model is saved, built with the PyTorch engine and run without a server.
*TensorRT*: the network is defined through TensorRT-RTX's API and computed by an interpreter that
reads it back; no GPU takes part.
"""


def page(record: Mapping[str, Any]) -> str:
    """The text of the page.

    Args:
        record: facts of the run, ``models`` with the result of each configuration, and
            ``without_generate``.
    """
    models: dict[str, dict[str, Any]] = record["models"]
    rows = {name: each for name, each in models.items() if each.get("generate") == "ok"}
    versions = record["versions"]
    engines = {"cpu": "CPU", "tensorrt": "TensorRT"}
    counts = [
        f"{title}: {sum(each.get(key) == 'equal' for each in rows.values())} of {len(rows)} equal"
        for key, title in engines.items()
    ]
    lines = [
        f"| `{name}` | {_cell(row, 'cpu')} | {_cell(row, 'tensorrt')} |"
        for name, row in rows.items()
    ]
    parts = [
        HEAD,
        f"{'; '.join(counts)}.\ntransformers {versions['transformers']}, PyTorch "
        f"{versions['torch']}; {record['date'][:10]}, `{record['command']}`, which resumes: "
        f"rows ran at\n{', '.join(sorted({each['commit'] for each in rows.values()}))} "
        f"(`benchmarks/results/models.json` has each row's).\n",
        "| model | CPU | TensorRT |\n| --- | --- | --- |\n" + "\n".join(lines) + "\n",
    ]
    excluded = record["without_generate"] | {
        name: each.get("generate", "not run")
        for name, each in models.items()
        if each.get("generate") != "ok"
    }
    if excluded:
        reasons = [f"| `{name}` | {_escape(reason)} |" for name, reason in excluded.items()]
        parts += [
            f"## Left out ({len(excluded)})\n",
            "| model | `generate` alone on token ids |\n| --- | --- |\n"
            + "\n".join(reasons)
            + "\n",
        ]
    return "\n".join(parts)


def _cell(row: Mapping[str, Any], engine: str) -> str:
    return _escape(str(row.get(engine, "not run")))


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
