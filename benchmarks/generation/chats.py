"""Chats that are sent whole each turn: Inplace with and without prefix reuse, beside vLLM.

    python -m benchmarks.generation.chats --vllm-python /path/to/python --shape 1b \
        --models build/compare/models --engines build/compare/engines --out r.json

``--models`` has the Hugging Face folder that `benchmarks.generation.sources` writes, ``--engines``
what `inplace build` made of it with ``--serve stream``, under the same name. Inplace is measured
over gRPC on tritonserver, vLLM through its OpenAI server with prefix caching on; one after the
other. Each user has a key of its own, so that no user shares a prefix with another one.

All users begin at once and send their next turn when the last one is answered. Prompts are of
random tokens, answers are greedy and of a fixed length. For each number of users it gives tokens a
second, the time to the first token of all turns, of the first and of the last ones, and how many
tokens of prompts were reused, as the server counts them.
"""

import argparse
import json
import os
import re
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from inplace.protocol import PREFIX_REUSE
from inplace.schema.served import Manifest

from benchmarks.generation.chat_users import Chats
from benchmarks.generation.clients import Target
from benchmarks.generation.measured import described, run_chats
from benchmarks.generation.vllm_server import MODEL, VllmOptions, VllmServer, versions_of
from benchmarks.perf import generator
from benchmarks.perf.served import served
from benchmarks.perf.server import FLUSH
from benchmarks.record import facts

WAYS = ("inplace", "inplace_without_reuse", "vllm")
REUSED = {
    "inplace": "inplace_prefix_tokens_total",
    "inplace_without_reuse": "inplace_prefix_tokens_total",
    "vllm": "vllm:prefix_cache_hits_total",
}
"""The counter of tokens of prompts that were not computed again."""

CASE_SECONDS = 10.0
"""Seconds that must be left to begin a case."""

Serving = tuple[Target, Callable[[], float]]
"""A target, and how many tokens its server has reused so far."""


def main() -> None:
    """Measure, print and write."""
    given = _arguments()
    manifest = Manifest.load(given.engines / given.shape / "1")
    users = [int(count) for count in given.users.split(",")]
    load = Chats(
        Target("grpc", "", "", 1), 1, given.turns, given.system, given.question, given.tokens
    )
    if manifest.capacity is not None and load.longest > manifest.capacity:
        raise SystemExit(f"a chat has {load.longest} tokens; the capacity is {manifest.capacity}")
    if max(users) > manifest.slots:
        raise SystemExit(f"{max(users)} users need as many slots; there are {manifest.slots}")
    what = (
        f"chats of {given.turns} turns, each sent whole: {given.system} tokens, then"
        f" {given.question} of each question and {given.tokens} of each answer; greedy"
    )
    step = manifest.program("step")
    document: dict[str, Any] = facts(what, "python -m benchmarks.generation.chats") | {
        "note": given.note,
        "model": {
            "shape": given.shape,
            "engine": step.engine.kind,
            "device": manifest.device,
            "dtype": str(step.engine.dtype),
            "slots": manifest.slots,
            "capacity": manifest.capacity,
        },
        "setups": {},
        "cases": [{"users": count} for count in users],
        "failed": [],
    }
    deadline = time.monotonic() + given.limit
    for way in given.ways.split(","):
        try:
            with _serving(way, given, manifest, document, deadline) as (target, reused):
                _measure(way, replace(load, target=target), reused, given, document, deadline)
        except Exception as error:  # the others go on
            print(f"{way} failed: {error}", flush=True)
            document["failed"].append(f"{way}: {str(error)[-1500:]}")
        _write(given.out, document)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, default=Path("build/compare/models"))
    parser.add_argument("--engines", type=Path, default=Path("build/compare/engines"))
    parser.add_argument("--shape", default="1b", help="the name of the model in both folders")
    parser.add_argument("--vllm-python", type=Path, help="interpreter of its environment")
    parser.add_argument("--ways", default=",".join(WAYS), help="in this order")
    parser.add_argument("--users", default="1,16,64", help="separated by commas")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--system", type=int, default=256, help="tokens before the first question")
    parser.add_argument("--question", type=int, default=48, help="tokens of a question")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an answer")
    parser.add_argument(
        "--clients", type=int, default=max(1, min(8, (os.cpu_count() or 2) // 2)),
        help="processes of clients",
    )  # fmt: skip
    parser.add_argument("--vllm-memory", type=float, default=0.5, help="share of GPU memory")
    parser.add_argument("--vllm-options", default="", help="further arguments of vllm serve")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds")
    parser.add_argument("--note", default="", help="what else ran on the machine")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if "vllm" in given.ways.split(",") and given.vllm_python is None:
        parser.error("to measure vLLM, --vllm-python names its interpreter")
    return given


@contextmanager
def _serving(
    way: str,
    given: argparse.Namespace,
    manifest: Manifest,
    document: dict[str, Any],
    deadline: float,
) -> Iterator[Serving]:
    """A server of a way."""
    begin = time.monotonic()
    limits = {spec.name: spec.maximum for spec in manifest.program("step").client_inputs}
    vocabulary = (limits["input_ids"] or 0) + 1
    if way == "vllm":
        assert manifest.capacity is not None
        folder = Path("build") if given.out is None else given.out.parent
        options = VllmOptions(
            given.vllm_python,
            given.models / given.shape,
            manifest.capacity,
            manifest.slots,
            given.vllm_memory,
            folder / "vllm-caches",
            folder / f"vllm-chats-{given.shape}.log",
            ("--enable-prefix-caching", *given.vllm_options.split()),
            max(1.0, min(240.0, deadline - time.monotonic())),
        )
        with VllmServer(options) as server:
            document["setups"][way] = {
                "versions": versions_of(given.vllm_python),
                "arguments": server.options.command(0)[6:],
                "started_s": time.monotonic() - begin,
            }
            metrics = f"http://{server.url}/metrics"
            yield Target("vllm", server.url, MODEL, vocabulary), lambda: counter(metrics, way)
        return
    settings = {PREFIX_REUSE: "on" if way == "inplace" else "off"}
    model = given.engines / given.shape
    with served(model, manifest, "stream", settings=settings) as running:
        document["setups"][way] = {"settings": settings, "started_s": time.monotonic() - begin}
        page = f"http://{running.host}:{running.ports.metrics}/metrics"
        target = Target("grpc", running.grpc_url, manifest.name, vocabulary)
        yield target, lambda: counter(page, way)


def counter(url: str, way: str) -> float:
    """Tokens that a server has reused."""
    time.sleep(FLUSH)
    with urllib.request.urlopen(url, timeout=10) as answer:
        page = answer.read().decode()
    values = re.findall(rf"^{REUSED[way]}(?:{{[^}}]*}})? (\S+)$", page, re.MULTILINE)
    return sum(map(float, values))


def _measure(
    way: str,
    load: Chats,
    reused: Callable[[], float],
    given: argparse.Namespace,
    document: dict[str, Any],
    deadline: float,
) -> None:
    """All numbers of users, each with tokens that nobody has sent before."""
    for count in (1, max(case["users"] for case in document["cases"])):
        run_chats(replace(load, users=count, turns=3, salt=f"warm {count} "), given.clients)
    for case in document["cases"]:
        if deadline - time.monotonic() < CASE_SECONDS:
            print(f"no time is left for {way} with {case['users']} users", flush=True)
            continue
        before = reused()
        part = replace(load, users=case["users"], salt=f"{case['users']} users ")
        turns = run_chats(part, given.clients)
        case[way] = chatted(turns, part) | {"reused_tokens": reused() - before}
        print(json.dumps({"users": case["users"], way: case[way]}), flush=True)
        _write(given.out, document)


def chatted(turns: list[dict[str, Any]], load: Chats) -> dict[str, Any]:
    """What was measured of chats whose turns come one after the other."""
    first = [one["responses"][0][0] - one["sent"] for one in turns]
    last = (load.turns + 1) // 2
    prompts = load.users * sum(
        load.system + turn * (load.question + load.tokens) + load.question
        for turn in range(load.turns)
    )
    return described(turns) | {
        "first_token_us_of_first_turns": generator.percentiles(first[:: load.turns]),
        "first_token_us_of_last_turns": generator.percentiles(
            [each for place, each in enumerate(first) if place % load.turns >= last]
        ),
        "prompt_tokens": prompts,
    }


def _write(out: Path | None, document: dict[str, Any]) -> None:
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
