"""What the OpenAI front end costs: the same generations over gRPC and through it, in one run.

    python -m benchmarks.openai_front --model model_repository/my-stream-model --out r.json

The model is a decoder that was built with a tokenizer, ``--serve stream`` and as many slots as the
largest number of streams. All streams begin at once, and each generates ``--rounds`` times. The two
ways alternate, ``--repeats`` times, so that a change of the machine's speed affects both; the
result is the median. Over gRPC the clients take tokens and text, through the front end text.

Beside tokens a second and the time to the first token, it measures the processor time of the front
end, which other programs on the machine hardly change.
"""

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from inplace.schema.served import Manifest
from inplace_builder.tools.front_process import FrontOptions, FrontProcess
from inplace_builder.tools.tritonserver import Ports

from benchmarks.generation.burst import Burst
from benchmarks.generation.clients import Target
from benchmarks.generation.measured import cpu_seconds, described, run_burst
from benchmarks.perf.served import served
from benchmarks.record import facts

WAYS: dict[str, Literal["grpc", "openai"]] = {"grpc": "grpc", "front": "openai"}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--streams", default="1,8,64", help="separated by commas")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a generation")
    parser.add_argument("--rounds", type=int, default=2, help="generations of each stream")
    parser.add_argument("--repeats", type=int, default=3, help="of both ways")
    parser.add_argument("--workers", type=int, default=1, help="processes of the front end")
    parser.add_argument("--note", default="", help="what else was running, for the result")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    manifest = Manifest.load(given.model / "1")
    streams = [int(count) for count in given.streams.split(",")]
    if max(streams) > manifest.slots:
        parser.error(f"{max(streams)} streams need as many slots; there are {manifest.slots}")
    what = (
        f"{given.prompt} prompt tokens and {given.tokens} new ones a generation, {given.rounds} of "
        "each stream; greedy; over gRPC and through the OpenAI front end"
    )
    step = manifest.program("step")
    document: dict[str, Any] = facts(what, "python -m benchmarks.openai_front") | {
        "note": given.note,
        "workers": given.workers,
        "model": {
            "name": given.model.name,
            "engine": step.engine.kind,
            "device": manifest.device,
            "dtype": str(step.engine.dtype),
            "slots": manifest.slots,
            "rows": step.max_rows,
        },
        "cases": [],
    }
    options = FrontOptions("127.0.0.1", Ports(0).resolve().grpc)
    with (
        served(given.model, manifest, "stream") as server,
        FrontProcess(
            options, server.grpc_url, server.repository, [f"--workers={given.workers}"]
        ) as front,
    ):
        urls = {"grpc": server.grpc_url, "front": f"127.0.0.1:{options.port}"}
        limits = {spec.name: spec.maximum for spec in step.client_inputs}
        vocabulary = (limits["input_ids"] or 0) + 1
        loads = {}
        for way, api in WAYS.items():
            target = Target(api, urls[way], manifest.name, vocabulary)
            loads[way] = Burst(target, 1, given.rounds, given.prompt, given.tokens)
            run_burst(replace(loads[way], rounds=1), 1)  # the first request loads what is lazy
        for count in streams:
            measured: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
            for _ in range(given.repeats):
                for way, results in measured.items():
                    own = replace(loads[way], streams=count)
                    before = cpu_seconds(front.pid)
                    results.append(summary(run_burst(own, 1)))
                    spent = cpu_seconds(front.pid) - before
                    if way == "front":
                        tokens = own.streams * own.rounds * own.tokens
                        results[-1]["front_cpu_us_per_token"] = spent / tokens * 1e6
            case = {"streams": count, **{way: medians(each) for way, each in measured.items()}}
            document["cases"].append(case)
            print(json.dumps(case), flush=True)
    if given.out is not None:
        given.out.write_text(json.dumps(document, indent=1) + "\n")


def summary(generations: list[dict[str, Any]]) -> dict[str, float]:
    """Tokens a second, and the times to the first token."""
    result = described(generations)
    times = {f"first_token_us_{name}": us for name, us in result["first_token_us"].items()}
    return {"tokens_per_second": result["tokens_per_second"], **times}


def medians(results: list[dict[str, float]]) -> dict[str, float]:
    """Of each number, over the repeats."""
    return {name: statistics.median(each[name] for each in results) for name in results[0]}


if __name__ == "__main__":
    main()
