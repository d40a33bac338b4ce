"""From an engine directory to an engine bound to an arena.

Steps that touch nothing, so that what is prepared when a program first runs is ready before a client comes.
"""

from pathlib import Path

import torch

from inplace.engines.arena import Arena
from inplace.engines.base import NO_OTHER_THREADS, StepEngine
from inplace.engines.torch_engine import TorchEngine
from inplace.errors import LoadError
from inplace.runtime.batcher import ActiveRequest, form
from inplace.runtime.requests import Request
from inplace.runtime.slots import SequenceState
from inplace.schema.served import Manifest, Program
from inplace.schema.specs import Role

NULL = -1
"""The slot of a null row."""


def warm(engine: StepEngine, program: Program) -> None:
    """Run a program on null rows: one that decodes, as many as fit, and one with a whole chunk.

    Raises:
        LoadError: it fails.
    """
    sizes = {(1, 1): None, (program.max_rows, 1): None}
    if program.row_layout == "packed":
        sizes[1, program.chunk] = None
    names = [spec.name for spec in program.outputs]
    for rows, tokens in sizes:
        try:
            engine.launch(
                form(program, [_null_row(program, tokens) for _ in range(rows)]).inputs, names
            )(NO_OTHER_THREADS)
        except Exception as error:  # whatever the program throws is why the model cannot be served
            raise LoadError(
                f"the engine fails in its first step ({type(error).__name__}: {error}); build the model again"
            ) from error


def _null_row(program: Program, tokens: int) -> ActiveRequest:
    inputs = {
        spec.name: torch.full(
            (tokens, *spec.shape[1:]) if spec.role is Role.TOKENS else spec.shape,
            spec.minimum or 0,
            dtype=spec.dtype.as_torch,
        )
        for spec in program.client_inputs
    }
    return ActiveRequest(
        Request("", start=True, end=True, inputs=inputs),
        SequenceState("", NULL),
        inputs,
        tokens,
        before=0,
    )


def load_engine(folder: Path, manifest: Manifest, arena: Arena) -> StepEngine:
    """Load the engine file that the manifest names, whole and unchanged, bind its states to the arena, and warm it.

    Raises:
        LoadError: the file is missing, truncated or changed, disagrees with the manifest or was built for another machine; or the engine
            fails when it is warmed.
    """
    if manifest.engine.kind == "torch":
        engine = TorchEngine(manifest.engine.checked(folder), manifest, arena)
        warm(engine, manifest.program("step"))
        return engine
    from inplace.engines.tensorrt import TensorRtEngine  # imports TensorRT

    return TensorRtEngine(folder, manifest, arena)
