"""From an engine directory to an engine that is bound to an arena and warmed up."""

from pathlib import Path

import torch

from inplace.engines import NO_OTHER_THREADS, StepEngine
from inplace.engines.arena import Arena
from inplace.engines.torch_engine import TorchEngine
from inplace.errors import LoadError
from inplace.runtime.batcher import ActiveRequest, form_batch
from inplace.runtime.requests import Request
from inplace.runtime.slots import SequenceState
from inplace.schema.served import Manifest, Program
from inplace.schema.specs import Role

NULL_SLOT = -1
"""The slot of a null row, which reads and writes no state."""


def load_engine(folder: Path, manifest: Manifest, arena: Arena) -> StepEngine:
    """Load the engine file that the manifest names, bind its states to the arena and warm it up.

    Raises:
        LoadError: the file is missing, truncated or changed, disagrees with the manifest or was
            built for another machine; or the engine fails in its first step.
    """
    if manifest.engine.kind == "torch":
        engine = TorchEngine(manifest.engine.verified(folder), manifest, arena)
        warm_up(engine, manifest.program("step"))
        return engine
    from inplace.engines.tensorrt import TensorRtEngine  # imports TensorRT

    return TensorRtEngine(folder, manifest, arena)


def warm_up(engine: StepEngine, program: Program) -> None:
    """Run steps of null rows, so that what the first steps prepare is ready before any client.

    The steps are one decode row, all rows of a step, and one row with a whole chunk of prefill.

    Raises:
        LoadError: a step fails.
    """
    sizes = {(1, 1): None, (program.max_rows, 1): None}  # a dict, for its order
    if program.row_layout == "packed":
        sizes[1, program.chunk] = None
    names = [spec.name for spec in program.outputs]
    for num_rows, num_tokens in sizes:
        rows = [_null_row(program, num_tokens) for _ in range(num_rows)]
        try:
            engine.launch(form_batch(program, rows).inputs, names)(NO_OTHER_THREADS)
        except Exception as error:  # of any type, whatever the program raises
            raise LoadError(
                f"the engine fails in its first step ({type(error).__name__}: {error}); build the"
                f" model again"
            ) from error


def _null_row(program: Program, num_tokens: int) -> ActiveRequest:
    inputs = {
        spec.name: torch.full(
            (num_tokens, *spec.shape[1:]) if spec.role is Role.TOKENS else spec.shape,
            spec.minimum or 0,
            dtype=spec.dtype.as_torch,
        )
        for spec in program.client_inputs
    }
    request = Request("", start=True, end=True, inputs=inputs)
    return ActiveRequest(request, SequenceState("", NULL_SLOT), inputs, num_tokens, start_length=0)
