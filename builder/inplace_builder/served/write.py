"""Write the engine of a captured model: the PyTorch program, or a TensorRT plan with its weights."""

from dataclasses import dataclass
from pathlib import Path

from inplace.schema.artifacts import EngineFile, File
from inplace.schema.served import AliasKind, Lowering, Program
from inplace.trt import Flavor
from torch.export.passes import move_to_device_pass

from inplace_builder import archive
from inplace_builder.capture.capture import Capture
from inplace_builder.choices import Device

TORCH_FILE, PLAN_FILE, WEIGHTS_FILE = "engine.pt2", "engine.plan", "weights.safetensors"


@dataclass(frozen=True)
class WrittenEngine:
    """What was written.

    Attributes:
        engine: the files.
        program: the program with the aliases that the engine has.
        lowering: how each state is updated.
        verifiable: whether it can be run here.
        notes: what to record of the build.
    """

    engine: EngineFile
    program: Program
    lowering: tuple[Lowering, ...]
    verifiable: bool
    notes: dict[str, str]


def write_torch(capture: Capture, folder: Path, device: Device) -> WrittenEngine:
    """Write the captured graph itself.

    Raises:
        OSError: it cannot be written.
    """
    exported = (
        capture.exported if device == "cpu" else move_to_device_pass(capture.exported, device)
    )
    archive.save(exported, folder / TORCH_FILE)
    file = File.of(folder / TORCH_FILE)
    engine = EngineFile(kind="torch", **file.model_dump(), device=device, dtype=capture.dtype)
    return WrittenEngine(engine, capture.program, capture.lowering, True, {})


def write_tensorrt(
    capture: Capture,
    folder: Path,
    flavor: Flavor,
    *,
    slots: int,
    alias: AliasKind | None,
    strict: bool,
    compute_capability: str | None,
) -> WrittenEngine:
    """Compile the captured graph and write the plan, and beside it the weights that it takes as inputs.

    Raises:
        BuildError: it cannot be compiled, or not for that GPU.
        LoadError: TensorRT is not installed.
        OSError: it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from inplace_builder.lower.compile import Target
    from inplace_builder.served.plan import build_plan

    target = Target.of(flavor, compute_capability)
    built = build_plan(
        capture,
        target.tensorrt,
        slots=slots,
        alias=alias,
        strict=strict,
        compute_capabilities=target.capabilities,
    )
    (folder / PLAN_FILE).write_bytes(built.plan)
    weights = None
    if built.weights:
        try:
            save_file(
                {
                    name: tensor.detach().cpu().contiguous()
                    for name, tensor in built.weights.items()
                },
                folder / WEIGHTS_FILE,
            )
        except SafetensorError as error:  # a full disk among others
            raise OSError(str(error)) from error
        weights = File.of(folder / WEIGHTS_FILE)
    file, plan = File.of(folder / PLAN_FILE), target.plan(built.profiles, weights)
    engine = EngineFile(
        kind="tensorrt", **file.model_dump(), device="cuda", dtype=capture.dtype, plan=plan
    )
    notes = {flavor: plan.version, "weights_in_plan_bytes": str(built.baked)}
    return WrittenEngine(engine, built.program, built.lowering, target.here, notes)
