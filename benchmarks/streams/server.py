"""Streams through a real tritonserver on this machine, by clients that speak in real time.

    python -m benchmarks.streams.server FOLDER STREAMS,STREAMS… SECONDS LIMIT

prints a line of JSON for each number of streams, as `benchmarks.streams.alone` does.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from inplace.protocol import AUDIO_INT16, SAMPLE_RATE
from inplace.runtime.audio import audio_spec
from inplace.schema.served import Manifest
from inplace_builder.tools.tritonserver import Ports, TritonServer

from benchmarks.perf import generator
from benchmarks.perf.clients import Load
from benchmarks.streams.alone import parse

CHUNKS = 250
"""Chunks of a client's stream; then it begins another one."""


WARM_UP = 4.0
"""Seconds that are not measured."""


def main() -> None:
    """Serve the model and drive it with numbers of streams."""
    begin = time.perf_counter()
    folder, counts, seconds, limit = parse(sys.argv[1:])
    audio = audio_spec(Manifest.load(folder / "1").interface)
    assert audio is not None
    assert audio.sample_rate is not None
    samples, rate = audio.shape[0], audio.sample_rate
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "chunks.json"
        data.write_text(json.dumps({"data": [_stream(samples)]}))
        repository = Path(scratch) / "repository"
        repository.mkdir()
        (repository / folder.name).symlink_to(folder.resolve())
        log = Path(scratch) / "log"
        with TritonServer(repository, Ports(0, 0, 0), log=log, trust_models=[folder]) as server:
            print(f"loaded in {time.perf_counter() - begin:.1f} s", file=sys.stderr, flush=True)
            for count in counts:
                needed = generator.READY + WARM_UP + seconds
                if time.perf_counter() - begin + needed > limit:
                    break
                load = Load(
                    url=server.grpc_url,
                    model=folder.name,
                    mode="unary",
                    sequences=count,
                    begin=0.0,
                    seconds=seconds,
                    input_data=str(data),
                    rate=count * rate / samples,
                    warm_up=WARM_UP,
                    output="tokens",
                    parameters={SAMPLE_RATE: rate},
                )
                measured = _line(generator.run(load), count, samples / rate)
                print(json.dumps(measured), flush=True)
                if not measured["keeps_up"]:
                    break


def _line(result: dict[str, Any], streams: int, chunk_seconds: float) -> dict[str, Any]:
    """A line of the result: whether so many streams keep up."""
    times = result["latency_us"]
    return result | {
        "where": "server",
        "streams": streams,
        "chunk_ms": chunk_seconds * 1e3,
        "keeps_up": not result["refused"] and bool(times) and times["p99"] < chunk_seconds * 1e6,
    }


def _stream(samples: int) -> list[dict[str, Any]]:
    """The requests of one stream of noise, in the format of `benchmarks.perf`."""
    noise = np.random.default_rng(0).normal(0.0, 3000.0, (8, samples)).astype(np.int16)
    chunks = [
        {AUDIO_INT16: {"content": row.tolist(), "shape": [samples], "datatype": "INT16"}}
        for row in noise
    ]
    return [chunks[place % len(chunks)] for place in range(CHUNKS)]


if __name__ == "__main__":
    main()
