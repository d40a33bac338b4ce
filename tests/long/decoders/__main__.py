"""The survey as a command.

``PYTHONPATH=tests:tests/long python -m decoders [--again TEXT] [--only NAME …] [--limit SECONDS]``
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from decoders import page
from decoders.configs import CONFIGS, WITHOUT_GENERATE
from decoders.survey import survey

from benchmarks.record import facts

WHAT = "tiny decoders of transformers on the CPU engine and as TensorRT networks, beside generate"


def main() -> None:
    """Survey what has no result yet, and write the page after each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--again", metavar="TEXT", help="also those whose result has this text; '' for all"
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these, whatever their result")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds a model may take")
    given = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    if page.RESULTS.exists():
        results = json.loads(page.RESULTS.read_text())["models"]
    commit = facts(WHAT, "make models", [])["commit"]
    for name in list(_chosen(results, given.only, given.again)):
        begin = time.monotonic()
        results[name] = _in_a_process(name, given.limit) | {"commit": commit}
        print(f"{time.monotonic() - begin:6.1f} s  {name}: {results[name]}", flush=True)
        _save(results)


def _chosen(results: dict[str, Any], only: list[str] | None, again: str | None) -> Iterator[str]:
    """The names to survey: those without result, or as the arguments say."""
    for name in CONFIGS:
        text = json.dumps(results.get(name))
        if name in only if only else name not in results or (again is not None and again in text):
            yield name


def _in_a_process(name: str, limit: float) -> dict[str, Any]:
    """The result of one model, as far as it is known when the time is over."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    context = multiprocessing.get_context("fork")  # imports nothing again
    process = context.Process(target=_survey, args=(name, sender), daemon=True)
    process.start()
    sender.close()
    result, end = {}, time.monotonic() + limit
    try:
        while receiver.poll(max(0.0, end - time.monotonic())):
            key, value = receiver.recv()
            result[key] = value
    except EOFError:
        reason = "the process ended"
    else:
        reason = f"not done after {limit:.0f} s"
    process.kill()
    process.join()
    if "generate" not in result:
        return {"generate": f"fails: {reason}"}
    if result["generate"] == "ok":
        return {"cpu": f"refused: {reason}", "tensorrt": f"refused: {reason}"} | result
    return result


def _survey(name: str, sender: Connection) -> None:
    with tempfile.TemporaryDirectory() as folder:
        survey(name, Path(folder), lambda key, value: sender.send((key, value)))


def _save(results: dict[str, Any]) -> None:
    ordered = {name: results[name] for name in CONFIGS if name in results}
    record = facts(WHAT, "make models", []) | {
        "without_generate": WITHOUT_GENERATE,
        "models": ordered,
    }
    page.RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    page.PAGE.write_text(page.page(record))


if __name__ == "__main__":
    main()
