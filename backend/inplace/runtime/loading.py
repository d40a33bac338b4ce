"""From an engine directory to an engine that is bound to an arena and warmed up."""

from collections.abc import Sequence

import torch
from torch import Tensor

from inplace.engines import NO_OTHER_THREADS, RepeatingEngine, StepEngine
from inplace.engines.arena import Arena
from inplace.engines.gpus import Gpu, check_memory, device_of
from inplace.engines.torch_engine import TorchEngine
from inplace.errors import LoadError
from inplace.runtime.batcher import NULL_SLOT, ActiveRequest, form_batch
from inplace.runtime.requests import Request
from inplace.runtime.slots import SequenceState
from inplace.schema.artifacts import EngineFile
from inplace.schema.files import EngineFolder
from inplace.schema.programs import CompiledProgram, Program
from inplace.schema.schedule import STEP
from inplace.schema.served import FILE_NAME, Manifest
from inplace.schema.specs import INITIAL_FILE, SCHEDULED_ROLES, Role
from inplace.schema.tensor_file import read_tensors


def make_arena(folder: EngineFolder, manifest: Manifest, slots: int) -> Arena:
    """Allocate the states of an engine, with the initial values that its files have.

    Raises:
        LoadError: the engine cannot run here (`check_engine`), there is not enough memory, or the
            initial values are missing or damaged.
    """
    check_engine(folder, manifest)
    if manifest.device == "cuda":
        check_memory(str(folder.path), manifest, slots, Gpu.current())
    initial = None
    if any(state.initial is not None for state in manifest.states):
        content = folder.read(manifest.file(INITIAL_FILE))
        initial = read_tensors(content, str(folder.path / INITIAL_FILE))
    return Arena(manifest.states, slots, device_of(manifest), initial)


def load_engine(
    folder: EngineFolder, manifest: Manifest, arena: Arena, name: str = STEP
) -> RepeatingEngine:
    """Load the engine file of a program, bind its states to the arena and warm it up.

    Raises:
        LoadError: the file is missing, truncated or changed, disagrees with the manifest or was
            built for another machine; the engine needs a later version, is code from a folder
            that is not trusted, or fails in its first step.
    """
    return load_engines(folder, manifest, arena, [name])[name]


def load_engines(
    folder: EngineFolder, manifest: Manifest, arena: Arena, names: Sequence[str]
) -> dict[str, RepeatingEngine]:
    """Load the engine files of programs, as `load_engine`; weights in one file are loaded once.

    Raises:
        LoadError: as `load_engine`.
    """
    check_engine(folder, manifest)
    engines: dict[str, RepeatingEngine] = {}
    by_file: dict[str, list[CompiledProgram]] = {}
    for name in names:
        program = manifest.program(name)
        by_file.setdefault(program.engine.file, []).append(program)
    weights: dict[str, dict[str, Tensor]] = {}
    for file, programs in by_file.items():
        record = manifest.file(file)
        if programs[0].engine.kind == "torch":
            title, called = str(folder.path / record.name), [each.name for each in programs]
            loaded = TorchEngine.load(folder.read(record), title, manifest, arena, called)
            for program, engine in zip(programs, loaded, strict=True):
                warm_up(engine, program)
                engines[program.name] = engine
            continue
        from inplace.engines.tensorrt import TensorRtEngine  # imports TensorRT

        for program in programs:
            engines[program.name] = TensorRtEngine(
                folder, manifest, arena, program=program.name, loaded_weights=weights
            )
    return engines


def check_engine(folder: EngineFolder, manifest: Manifest) -> None:
    """Refuse an engine that cannot run here, before anything of it is read or allocated.

    Raises:
        LoadError: it needs a later version of the runtime or a GPU, or is code from a folder that
            is not trusted.
    """
    _check_version(folder, manifest)
    for program in manifest.programs:
        _check_engine_file(folder, manifest, program.engine)


def _check_engine_file(folder: EngineFolder, manifest: Manifest, engine: EngineFile) -> None:
    record = manifest.file(engine.file)
    if engine.kind == "tensorrt":
        folder.check_trusted(record)
    if engine.device == "cuda" and not torch.cuda.is_available():
        plan = engine.plan
        gpu = f" ({plan.gpu or plan.compute_capability})" if plan is not None else ""
        advice = "; build with --device cpu" if engine.kind == "torch" else ""
        raise LoadError(
            f"{folder.path / record.name} was built for a GPU{gpu} and PyTorch finds none on this "
            f"machine{advice}"
        )


def _check_version(folder: EngineFolder, manifest: Manifest) -> None:
    """Refuse what the format has room for and this runtime does not run."""
    later: list[str] = []
    if manifest.is_scheduled:
        later += [
            f"input {spec.name} of the role {spec.role} in a schedule"
            for program in manifest.programs
            for spec in program.inputs
            if spec.role not in SCHEDULED_ROLES
        ]
    later += [f"scale of state {each.name}" for each in manifest.states if each.scale is not None]
    if later:
        raise LoadError(
            f"{folder.path / FILE_NAME} needs a later version of inplace: {', '.join(later)}; "
            "update inplace on this server, or build the model with this version"
        )


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
