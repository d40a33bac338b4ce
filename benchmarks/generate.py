"""Whole generations by a real tritonserver, beside the engine alone and transformers, in one run.

    python -m benchmarks.generate --model model_repository/my-stream-model \
        --transformers path/to/model --out r.json

The model is a built decoder with at least as many slots and rows as the largest number of streams.
One built with ``--serve step`` is served with the configuration for streams. For each number of
streams, all begin at once, and each generates ``--rounds`` times, one after the other, from prompts
of random tokens; the clients are processes of their own.

The clients measure tokens a second, time to the first token, and time between tokens (a response of
k tokens counts as k times a k-th). The backend's metrics give the share of that time in which the
engine was busy. Prints a line of JSON for each measurement, and writes all of them with machine,
versions and command. `benchmarks.perf` measures single steps.

With ``--beside vllm`` it compares Inplace with another server: `benchmarks.generation.comparison`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from inplace.schema.served import Manifest
from inplace_builder.tools.tritonserver import TritonServer

from benchmarks.generation import comparison
from benchmarks.generation.burst import Burst
from benchmarks.generation.clients import Target
from benchmarks.generation.measured import described, run_burst
from benchmarks.perf.served import served
from benchmarks.perf.server import Counters, engine_part
from benchmarks.record import ROOT, facts


def main() -> None:
    """Measure, print and write."""
    if "--beside" in sys.argv[1:]:
        comparison.main()
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, required=True, help="a built decoder in a model repository"
    )
    parser.add_argument("--streams", default="1,8,32,64", help="separated by commas")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a generation")
    parser.add_argument("--rounds", type=int, default=2, help="generations of each stream")
    parser.add_argument(
        "--clients",
        type=int,
        default=max(1, min(8, (os.cpu_count() or 2) // 2)),
        help="processes of clients",
    )
    parser.add_argument(
        "--transformers",
        type=Path,
        help="also measure it: the Hugging Face folder that the model was built from",
    )
    parser.add_argument(
        "--limit",
        type=float,
        default=600.0,
        help="seconds for the engine alone, and for transformers",
    )
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    manifest = Manifest.load(given.model / "1")
    streams = [int(count) for count in given.streams.split(",")]
    if (max_streams := max(streams)) > manifest.slots:
        parser.error(f"{max_streams} streams need as many slots; the model has {manifest.slots}")
    what = (
        f"{given.prompt} prompt tokens and {given.tokens} new ones a generation, "
        f"{given.rounds} of each stream; greedy"
    )
    document: dict[str, Any] = facts(what, "python -m benchmarks.generate") | {
        "model": {
            "name": given.model.name,
            "engine": manifest.program("step").engine.kind,
            "device": manifest.device,
        }
        | {
            "dtype": str(manifest.program("step").engine.dtype),
            "slots": manifest.slots,
            "rows": manifest.program("step").max_rows,
        },
        "generate": [],
    }
    for count in streams:
        document["generate"].append({"streams": count})
    with served(given.model, manifest, "stream") as server:
        lazy = replace(burst_of(given, server, manifest, 1), rounds=1, tokens=8)
        run_burst(lazy, 1)  # the first request loads what is lazy
        for line in document["generate"]:
            line["served"] = generated(given, server, manifest, line["streams"])
            print(json.dumps(line), flush=True)
            write(given.out, document)
    for name, results in beside(given, manifest, streams):
        for line, one in zip(document["generate"], results, strict=True):
            line[name] = one
            print(json.dumps({"streams": line["streams"], name: one}), flush=True)
        write(given.out, document)


def write(out: Path | None, document: dict[str, Any]) -> None:
    """What was measured so far."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(document, indent=1) + "\n")


def target_of(server: TritonServer, manifest: Manifest) -> Target:
    """The served model, over gRPC."""
    vocabulary = comparison.vocabulary_of(manifest)
    return Target("grpc", server.grpc_url, manifest.name, vocabulary)


def burst_of(
    given: argparse.Namespace, server: TritonServer, manifest: Manifest, streams: int
) -> Burst:
    """All streams at once."""
    target = target_of(server, manifest)
    return Burst(target, streams, given.rounds, given.prompt, given.tokens)


def generated(
    given: argparse.Namespace, server: TritonServer, manifest: Manifest, streams: int
) -> dict[str, Any]:
    """One number of streams, served."""
    load = burst_of(given, server, manifest, streams)
    before = Counters.of(server, manifest.name)
    result = described(run_burst(load, given.clients))
    spent = Counters.of(server, manifest.name) - before
    return result | engine_part(spent, result["seconds"])


def beside(
    given: argparse.Namespace, manifest: Manifest, streams: list[int]
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The same generations as one batch, by the engine alone and by transformers.

    Each runs in a process of its own, after the server has ended.
    """
    sizes = [",".join(map(str, streams)), str(given.prompt), str(given.tokens)]
    yield (
        "engine_alone",
        _json_lines(
            "benchmarks.generation.alone",
            len(streams),
            given.limit,
            str((given.model / "1").resolve()),
            *sizes,
        ),
    )
    if given.transformers is not None:
        engine = manifest.program("step").engine
        where = [str(given.transformers.resolve()), str(engine.dtype), engine.device]
        yield (
            "transformers",
            _json_lines("benchmarks.generation.beside", len(streams), given.limit, *where, *sizes),
        )


def _json_lines(module: str, count: int, limit: float, *arguments: str) -> list[dict[str, Any]]:
    """Run a module and return the lines of JSON that it printed within ``limit`` seconds.

    A measurement that it did not reach is reported as failed.
    """
    with tempfile.TemporaryFile("w+") as output:
        try:
            status = subprocess.run(
                [sys.executable, "-m", module, *arguments],
                stdout=output,
                cwd=ROOT,
                check=False,
                timeout=limit,
            ).returncode
            problem = f"status {status}"
        except subprocess.TimeoutExpired:
            problem = f"ended after {limit:.0f} s"
        output.seek(0)
        results = [json.loads(line) for line in output if line.startswith("{")]
    return results + [{"failed": problem}] * (count - len(results))


if __name__ == "__main__":
    main()
