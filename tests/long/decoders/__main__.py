"""The survey as a command.

``PYTHONPATH=tests:tests/long python -m decoders [--restart] [--again TEXT] [--only NAME …]
[--limit SECONDS] [--jobs N]``
"""

import argparse
import json
import multiprocessing
import multiprocessing.connection
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from decoders import page
from decoders.configs import CONFIGS, FORWARD, WITHOUT_GENERATE
from decoders.survey import survey

from benchmarks.record import facts

WHAT = "tiny decoders of transformers on the CPU engine and as TensorRT networks, beside generate"


def main() -> None:
    """Survey what has no result yet, and write the page after each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--restart", action="store_true", help="discard all results first")
    parser.add_argument("--again", metavar="TEXT", help="also those whose result has this text")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these, whatever their result")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds a model may take")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    given = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    if page.RESULTS.exists() and not given.restart:
        results = json.loads(page.RESULTS.read_text())["models"]
    head = facts(WHAT, "make models", [])
    chosen = list(_chosen(results, given.only, given.again))
    for name, seconds, result in _run(chosen, given.limit, given.jobs):
        results[name] = result | {"commit": head["commit"]}
        print(f"{seconds:6.1f} s  {name}: {results[name]}", flush=True)
        _save(head, results)


def _chosen(results: dict[str, Any], only: list[str] | None, again: str | None) -> Iterator[str]:
    """The names to survey: those without result, or as the arguments say."""
    for name in CONFIGS:
        text = json.dumps(results.get(name))
        if name in only if only else name not in results or (again is not None and again in text):
            yield name


@dataclass(eq=False)
class _Run:
    """The survey of one model in a process.

    Attributes:
        name: the model's.
        process: what surveys it.
        begin: when it began.
        result: what it has reported.
    """

    name: str
    process: BaseProcess
    begin: float
    result: dict[str, Any] = field(default_factory=dict)


def _run(names: list[str], limit: float, jobs: int) -> Iterator[tuple[str, float, dict[str, Any]]]:
    """Survey models, each in a process of its own; yields name, seconds and result as one ends."""
    context = multiprocessing.get_context("fork")  # imports nothing again
    waiting, running = list(reversed(names)), dict[Connection, _Run]()
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop()
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_survey, args=(name, sender), daemon=True)
            process.start()
            sender.close()  # so that the end of the process is the end of the pipe
            running[receiver] = _Run(name, process, time.monotonic())
        first = min(run.begin for run in running.values())
        ready = multiprocessing.connection.wait(
            list(running), max(0.0, first + limit - time.monotonic())
        )
        for receiver, run in list(running.items()):
            ended = ""
            if receiver in ready:
                try:
                    key, value = receiver.recv()
                    run.result[key] = value
                except EOFError:
                    run.process.join()
                    ended = f"not finished: the process ended with {run.process.exitcode}"
            elif time.monotonic() >= run.begin + limit:
                ended = f"not finished in {limit:.0f} s"
            if ended:
                run.process.kill()
                run.process.join()
                receiver.close()
                del running[receiver]
                yield run.name, time.monotonic() - run.begin, complete(run.result, ended)


def complete(result: dict[str, Any], reason: str) -> dict[str, Any]:
    """A result with the reason why verdicts are missing; none is missing after a whole survey."""
    if "generate" not in result:
        return {"generate": reason} | result
    if result["generate"] == "ok":
        return {"cpu": reason, "tensorrt": reason} | result
    return result


def _survey(name: str, sender: Connection) -> None:
    with tempfile.TemporaryDirectory() as folder:
        survey(name, Path(folder), lambda key, value: sender.send((key, value)))


def _save(head: dict[str, Any], results: dict[str, Any]) -> None:
    record = head | {
        "without_generate": WITHOUT_GENERATE,
        "without_result": [name for name in CONFIGS if name not in results],
        "forward": FORWARD,
        "models": {name: results[name] for name in CONFIGS if name in results},
    }
    page.RESULTS.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    page.PAGE.write_text(page.page(record))


if __name__ == "__main__":
    main()
