"""One model on several GPUs of a host beside one GPU, through one tritonserver, in one run.

    python -m benchmarks.gpus build --shapes 1b,8b --engines build/gpus
    python -m benchmarks.gpus run --shapes 1b,8b --engines build/gpus --gpus 0,1 --limit 540

``build`` makes engines of published shapes with random weights, side by side, each on a GPU of its
own; it needs transformers, ``run`` does not. For each shape, ``run`` measures with all GPUs and
with the first one alone: generations of ``--streams`` streams for each GPU, all at once, and single
steps of as many sequences in a closed loop (unary requests). It compares served tokens with the
engine alone (`benchmarks.gpus.solo`), and kills one engine while all generate
(`benchmarks.gpus.killed`). ``--limit`` bounds its seconds: what does not begin within them is left
out. Writes one JSON, each time something was measured.

``build … --engine torch --device cpu --shapes tiny`` and ``run --device cpu`` try it without a GPU:
then each number in ``--gpus`` is an engine of its own on the CPU.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from inplace.schema.served import Manifest
from inplace_builder.choices import EngineKind
from inplace_builder.tools.tritonserver import TritonServer

from benchmarks.generate import burst_of, generated, write
from benchmarks.generation.measured import run_burst
from benchmarks.gpus.killed import by_engine, measured
from benchmarks.perf import generator
from benchmarks.perf.__main__ import driven, loaded
from benchmarks.perf.served import Serve, served
from benchmarks.record import ROOT, facts

TIE = 0.25
"""Nats between the two most likely tokens within which rounding may choose either."""

MUST = {"generations": 1.9, "steps": 1.7}
"""Least ratio of two GPUs to one."""


def main() -> None:
    """Build, or measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("build", "run"))
    parser.add_argument("--shapes", default="1b,8b", help="of `benchmarks.gpu.shapes`")
    parser.add_argument("--engines", type=Path, default=Path("build/gpus"), help="folder of models")
    parser.add_argument("--gpus", default="0,1", help="their numbers, separated by commas")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--engine", choices=get_args(EngineKind), default="tensorrt")
    parser.add_argument("--rows", type=int, default=80, help="build: rows and slots of an engine")
    parser.add_argument("--capacity", type=int, default=1024, help="build: positions of a slot")
    parser.add_argument("--streams", type=int, default=64, help="for each GPU")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a generation")
    parser.add_argument("--rounds", type=int, default=4, help="generations of each stream")
    parser.add_argument("--seconds", type=float, default=5.0, help="of single steps")
    parser.add_argument("--compared", type=int, default=16, help="generations compared with solo")
    parser.add_argument("--killed-tokens", type=int, default=768, help="when one engine is killed")
    parser.add_argument("--limit", type=float, default=540.0, help="seconds of a run")
    parser.add_argument("--out", type=Path, default=Path("build/gpus/gpus.json"))
    given = parser.parse_args()
    if given.what == "build":
        build(given)
    else:
        run(given)


def build(given: argparse.Namespace) -> None:
    """Build all shapes at the same time, each on a GPU of its own."""
    shapes, gpus = given.shapes.split(","), given.gpus.split(",")
    running = []
    for number, shape in enumerate(shapes):
        folder = given.engines / shape
        folder.parent.mkdir(parents=True, exist_ok=True)
        arguments = [shape, str(folder), given.engine, given.device]
        arguments += [str(given.rows), str(given.capacity)]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]}
        command = [sys.executable, "-m", "benchmarks.gpus.model", *arguments]
        running.append((shape, subprocess.Popen(command, env=environment, cwd=ROOT)))
    if failed := [shape for shape, process in running if process.wait()]:
        raise SystemExit(f"not built: {', '.join(failed)}")


def run(given: argparse.Namespace) -> None:
    """Measure each shape."""
    given.clients = max(1, min(16, (os.cpu_count() or 2) // 2))
    gpus = tuple(map(int, given.gpus.split(",")))
    what = (
        f"{given.streams} streams for each GPU, {given.prompt} prompt tokens and {given.tokens} "
        f"new ones, {given.rounds} generations of each; single steps of as many sequences; greedy"
    )
    document = facts(what, "python -m benchmarks.gpus") | {"gpus": list(gpus), "shapes": []}
    ends = time.monotonic() + given.limit
    for shape in given.shapes.split(","):
        line: dict[str, Any] = {"shape": shape}
        document["shapes"].append(line)
        for name, measure in Shape(given, shape, gpus).parts():
            if time.monotonic() > ends and name != "killed":  # that was measured with the first
                line[name] = {"failed": f"not begun after {given.limit:.0f} s"}
                continue
            begin = time.monotonic()
            try:
                line[name] = measure()
            except Exception as error:  # the others are measured all the same
                line[name] = {"failed": f"{type(error).__name__}: {error}"}
            line[name]["took_s"] = time.monotonic() - begin
            line["ratios"] = ratios(line)
            print(json.dumps({"shape": shape, name: line[name]}), flush=True)
            write(given.out, document)
        print(json.dumps({"shape": shape, "ratios": line["ratios"]}), flush=True)
        write(given.out, document)


def ratios(line: dict[str, Any]) -> dict[str, Any]:
    """All GPUs to the first one, as far as both were measured."""
    found: dict[str, Any] = {}
    for kind, rate in (("generations", "tokens_per_second"), ("steps", "requests_per_second")):
        one, all_gpus = (line.get(f"{kind}_{which}", {}).get(rate) for which in ("one", "all"))
        if one and all_gpus:
            found[kind] = {"ratio": all_gpus / one, "must": MUST[kind]}
    return found


class Shape:
    """The measurements of one shape.

    Args:
        given: the options of the run.
        shape: its name.
        gpus: that serve it; the first one also alone.
    """

    def __init__(self, given: argparse.Namespace, shape: str, gpus: tuple[int, ...]) -> None:
        self._given, self._gpus = given, gpus
        self._model: Path = given.engines / shape
        self._manifest = Manifest.load(self._model / "1")
        self._kept: list[dict[str, list[int]]] = []
        self._killed: dict[str, Any] = {"failed": "there was no server to kill an engine of"}

    def parts(self) -> list[tuple[str, Callable[[], dict[str, Any]]]]:
        """The measurements by name, in order."""
        return [
            ("generations_all", lambda: self._generations(self._gpus)),
            ("killed", lambda: self._killed),
            ("generations_one", lambda: self._generations(self._gpus[:1])),
            ("steps_all", lambda: self._steps(self._gpus)),
            ("steps_one", lambda: self._steps(self._gpus[:1])),
            ("tokens", self._compared),
        ]

    def _served(self, serve: Serve, gpus: tuple[int, ...]) -> Any:
        on_gpus = self._manifest.device == "cuda"
        return served(
            self._model,
            self._manifest,
            serve,
            instances=1 if on_gpus else len(gpus),
            gpus=gpus if on_gpus else (),
        )

    def _generations(self, gpus: tuple[int, ...]) -> dict[str, Any]:
        given, name = self._given, self._manifest.name
        streams = given.streams * len(gpus)
        begin = time.monotonic()
        with self._served("stream", gpus) as server:
            ready = time.monotonic() - begin
            burst = burst_of(given, server, self._manifest, streams)
            warm_up = replace(burst, rounds=1, tokens=8)
            run_burst(warm_up, given.clients)  # the first requests load what is lazy
            result = generated(given, server, self._manifest, streams)
            result |= {"ready_after_s": ready, "streams": streams}
            result["engines"] = self._engines(server, name)
            if len(gpus) > 1:
                self._kept = self._sampled(server, streams)
                try:
                    self._killed = self._kill(server)
                except Exception as error:  # the generations were measured all the same
                    self._killed = {"failed": f"{type(error).__name__}: {error}"}
                server.stop(timeout=0)  # Triton would wait for the sequences of the dead process
        return result

    def _sampled(self, server: TritonServer, streams: int) -> list[dict[str, list[int]]]:
        """Some generations of a burst with their tokens, of streams all over it."""
        burst = burst_of(self._given, server, self._manifest, streams)
        burst = replace(burst, rounds=1, keeps_tokens=True)
        all_of_them = run_burst(burst, self._given.clients)
        every = max(1, len(all_of_them) // self._given.compared)
        chosen = all_of_them[::every][: self._given.compared]
        return [{"prompt": each["prompt"], "tokens": each["tokens"]} for each in chosen]

    @staticmethod
    def _engines(server: TritonServer, name: str) -> dict[str, dict[str, float]]:
        """What the metrics say of each engine since the server began."""
        names = {
            "tokens": "inplace_tokens_total",
            "sequences": "inplace_sequences_started_total",
            "forwarded": "inplace_requests_forwarded_total",
            "steps": "inplace_step_seconds_count",
            "step_seconds": "inplace_step_seconds_sum",
            "state_bytes": "inplace_state_bytes",
        }
        found: dict[str, dict[str, float]] = {}
        for key, metric in names.items():
            for engine, (value, _) in by_engine(server, name, metric).items():
                found.setdefault(engine, {})[key] = value
        return found

    def _steps(self, gpus: tuple[int, ...]) -> dict[str, Any]:
        sequences = self._given.streams * len(gpus)
        with self._served("step", gpus) as server:
            load = loaded(
                argparse.Namespace(**vars(self._given), input_data=None, max_tokens=1),
                "unary",
                float(sequences),
                server.grpc_url,
                self._manifest.name,
            )
            result = driven(server, generator.run, load, len(gpus))
            engines = self._engines(server, self._manifest.name)
        return {"sequences": sequences} | result | {"engines": engines}

    def _kill(self, server: TritonServer) -> dict[str, Any]:
        """Kill an engine while sequences generate; their tokens are compared, too."""
        given, name = self._given, self._manifest.name
        streams = max(2, given.streams * len(self._gpus) // 4)
        burst = burst_of(given, server, self._manifest, streams)
        result, completed = asyncio.run(measured(server, name, burst, streams, given.killed_tokens))
        every = max(1, len(completed) // given.compared * 2)
        self._kept += [
            {"prompt": each.prompt, "tokens": each.tokens} for each in completed[::every]
        ]
        return result

    def _compared(self) -> dict[str, Any]:
        command = [sys.executable, "-m", "benchmarks.gpus.solo", str(self._model / "1"), str(TIE)]
        done = subprocess.run(
            command,
            input=json.dumps(self._kept),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            cwd=ROOT,
        )
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result


if __name__ == "__main__":
    main()
