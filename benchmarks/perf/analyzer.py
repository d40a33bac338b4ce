"""The same loads with perf_analyzer, where it runs."""

import json
import platform
import shutil
import subprocess
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.perf.clients import Load, Measured
from benchmarks.perf.generator import described

NEEDS_GLIBC = (2, 38)


def missing() -> str | None:
    """Why perf_analyzer cannot run here; None where it can."""
    if shutil.which("perf_analyzer") is not None:
        return None
    name, version = platform.libc_ver()
    if name == "glibc" and tuple(map(int, version.split("."))) < NEEDS_GLIBC:
        return (
            f"perf_analyzer needs glibc {NEEDS_GLIBC[0]}.{NEEDS_GLIBC[1]}, "
            f"this machine has {version} (pip installs an empty placeholder, 0.1.0, here)"
        )
    return "perf_analyzer is not on PATH: `pip install perf-analyzer==2.60.0`"


def run(load: Load) -> dict[str, Any]:
    """Drive the load and describe what was measured, in the schema of `benchmarks.perf`.

    Raises:
        RuntimeError: perf_analyzer failed; the end of its output.
    """
    with tempfile.TemporaryDirectory() as folder:
        export = Path(folder) / "export.json"
        done = subprocess.run(
            [*command(load), "--profile-export-file", str(export)],
            capture_output=True,
            text=True,
            check=False,
        )
        if not export.is_file():
            raise RuntimeError(
                f"perf_analyzer ended with status {done.returncode}: "
                f"{(done.stderr + done.stdout).strip()[-800:]}"
            )
        experiment = json.loads(export.read_text())["experiments"][0]
    return described(*measured(experiment))


def command(load: Load) -> list[str]:
    """The command line, as one would type it."""
    made = [
        "perf_analyzer",
        "-m",
        load.model,
        "-u",
        load.url,
        "-i",
        "grpc",
        f"--input-data={load.input_data}",
    ]
    if load.mode != "generate":
        made += ["--request-parameter", "logits:false:bool"]  # it requests all outputs
    # it exports nothing where the throughput of its windows differs by more than this percentage
    made += [
        "--measurement-interval",
        str(int(load.seconds * 1000)),
        "--max-trials",
        "4",
        "--stability-percentage",
        "50",
    ]
    if load.rate is None:
        made += ["--concurrency-range", str(load.sequences)]
    else:
        made += ["--request-rate-range", str(load.rate), "--num-of-sequences", str(load.sequences)]
    if load.mode != "unary":
        made.append("--streaming")
    if load.mode == "generate":
        made += [
            "--request-parameter",
            f"max_tokens:{load.max_tokens}:int",
            "--request-parameter",
            "ignore_eos:true:bool",
        ]
    return made


def measured(experiment: dict[str, Any]) -> tuple[list[Measured], float]:
    """The requests of an experiment that were answered within its windows, and their seconds.

    A response counts as one token: with the default ``stream_interval`` it is one, unless the
    client is slow.
    """
    since, until = min(experiment["window_boundaries"]), max(experiment["window_boundaries"])
    measured = Measured()
    for request in experiment["requests"]:
        times = [request["timestamp"], *request["response_timestamps"]]
        if len(times) < 2 or not since <= times[-1] <= until:
            continue
        measured.latencies.append((times[-1] - times[0]) / 1e9)
        measured.first.append((times[1] - times[0]) / 1e9)
        measured.gaps += [(later - earlier) / 1e9 for earlier, later in pairwise(times[1:])]
        measured.tokens += len(times) - 1
    return [measured], (until - since) / 1e9
