"""How many streams of speech keep up: each sends its audio in real time, a chunk at a time.

    python -m benchmarks.streams [--lookaheads 0,3] [--streams 64,256,560] [--server 64,200]

The model has the published size of ``nemotron_asr_streaming``, with random weights, and the blank's
bias such that noise gives about as many tokens as speech. Streams keep up if the 99th
percentile of a chunk's answer is below the chunk's length and no chunk was complete before the one
before it was answered. ``--streams`` are measured in the engine alone, ``--server`` with clients of
a real tritonserver on this machine; each stops at the first number that does not keep up. Writes
one JSON, after each line that is measured. Kept engines are measured without transformers, and may
be built before, each lookahead by a process of its own (``--build-only``).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import torch
from inplace.schema.served import Manifest
from inplace_builder.choices import EngineKind

from benchmarks.record import facts
from benchmarks.streams import MODEL, TOKENS_PER_FRAME

Line = dict[str, Any]


def main() -> None:
    """Build, measure, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--lookaheads", default="0,3", help="encoded frames of 80 ms; a chunk has one more"
    )
    parser.add_argument("--streams", default="64,128,256,384,560,768,1024,1280,1536,2048")
    parser.add_argument("--server", default="64,128,200,256,384,560")
    parser.add_argument("--rows", type=int, default=256, help="most streams in one call")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each number of streams")
    parser.add_argument("--engine", choices=get_args(EngineKind), default="tensorrt")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--layers", type=int, help="of the encoder; default: the published 24")
    parser.add_argument("--engines", type=Path, help="keep engines here, and take what is kept")
    parser.add_argument("--build-only", action="store_true")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds for all of it")
    parser.add_argument("--out", type=Path, default=Path("build/gpu/gpu_streams.json"))
    given = parser.parse_args()
    document = facts(__doc__.partition("\n")[0], "python -m benchmarks.streams") | {
        "tokens_per_frame": TOKENS_PER_FRAME,
        "lines": [],
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for line in measured(given, given.engines or Path(scratch)):
            print(json.dumps(line), flush=True)
            document["lines"].append(line)
            given.out.write_text(json.dumps(document, indent=1) + "\n")
    print(f"written to {given.out}")


def measured(given: argparse.Namespace, engines: Path) -> Iterator[Line]:
    """All lines of the result."""
    begin = time.monotonic()
    alone, served = (
        [int(count) for count in numbers.split(",") if count]
        for numbers in (given.streams, given.server)
    )
    for lookahead in map(int, given.lookaheads.split(",")):
        folder = engines / f"{given.engine}-{lookahead}" / MODEL
        built: Line = {}
        if not (folder / "1").is_dir():
            built = {"build_seconds": _build(folder, lookahead, max(alone + served), given)}
        manifest = Manifest.load(folder / "1")
        about = {"lookahead": lookahead, "engine": given.engine, "slot_bytes": manifest.slot_bytes}
        if built or given.build_only:
            yield about | built
        if given.build_only:
            continue
        for where, counts in (("alone", alone), ("server", served)):
            left = given.limit - (time.monotonic() - begin)
            if counts and left > 0:
                numbers = ",".join(map(str, counts))
                yield from (
                    about | line for line in _lines(where, folder, numbers, given.seconds, left)
                )


def _build(
    folder: Path, lookahead: int, streams: int, given: argparse.Namespace
) -> dict[str, float]:
    """Build an engine; the seconds of each phase."""
    from benchmarks.streams.model import build  # transformers: kept engines need none

    seconds = build(
        folder,
        lookahead,
        streams=streams,
        rows=given.rows,
        engine=given.engine,
        device=given.device,
        layers=given.layers,
    )
    if given.device == "cuda":
        torch.cuda.empty_cache()
    return seconds


def _lines(where: str, folder: Path, streams: str, seconds: float, limit: float) -> Iterator[Line]:
    """What a process of its own measures, a line for each number of streams."""
    command = [f"benchmarks.streams.{where}", str(folder), streams, str(seconds), str(limit)]
    with subprocess.Popen(
        [sys.executable, "-m", *command], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for text in process.stdout:
            line: Line = json.loads(text)
            yield line
    if process.returncode:
        yield {"where": where, "failed": f"exit status {process.returncode}"}


if __name__ == "__main__":
    main()
