"""A published shape with random weights as a model for streams: one process, on the first GPU.

``python -m benchmarks.gpus.model SHAPE FOLDER ENGINE DEVICE ROWS CAPACITY`` builds it, and prints
each stage with the seconds since the beginning. It imports transformers.
"""

import sys
import time
from pathlib import Path

from inplace.schema.served import Manifest
from inplace.schema.specs import Dtype
from inplace_builder.capture.huggingface import capture_decoder
from inplace_builder.choices import Device, EngineKind
from inplace_builder.served.build import write_engine
from inplace_builder.served.decoder import decoder_options
from inplace_builder.served.options import BuildOptions

from benchmarks.gpu.shapes import random_model


def build(
    shape: str, folder: Path, engine: EngineKind, device: Device, rows: int, capacity: int
) -> Manifest:
    """Build a model of this shape, a slot for each row, and verify it against transformers."""
    begin = time.perf_counter()

    def stage(name: str) -> None:
        print(f"{shape}: {time.perf_counter() - begin:.0f} s, {name}", flush=True)

    stage("make the weights")
    dtype = Dtype.BFLOAT16 if device == "cuda" else Dtype.FLOAT32
    model = random_model(shape, dtype.as_torch, "cpu")
    options = BuildOptions(
        dtype=dtype,
        device=device,
        engine=engine,
        slots=rows,
        max_rows=rows,
        capacity=capacity,
        serve="stream",
    )
    stage("capture the graph")
    capture = capture_decoder(model, decoder_options(options))
    manifest = write_engine(capture, folder, options, stage, prepare=lambda: model.to(device))
    stage("built")
    return manifest


if __name__ == "__main__":
    build(
        sys.argv[1],
        Path(sys.argv[2]),
        sys.argv[3],  # type: ignore[arg-type]
        sys.argv[4],  # type: ignore[arg-type]
        int(sys.argv[5]),
        int(sys.argv[6]),
    )
