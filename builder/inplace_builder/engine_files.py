"""Write the engine of a captured model: the PyTorch program, or a TensorRT plan with its weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from inplace.artifacts import EngineFile, File, Plan
from inplace.manifest import Kind, Lowering, Program
from torch.export.passes import move_to_device_pass

from inplace_builder import archive
from inplace_builder.capture import Capture

TORCH_FILE, PLAN_FILE, WEIGHTS_FILE = "engine.pt2", "engine.plan", "weights.safetensors"
ENGINES = ("torch", "tensorrt", "tensorrt_rtx")


@dataclass(frozen=True)
class Written:
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


def write_torch(capture: Capture, folder: Path, device: Literal["cpu", "cuda"]) -> Written:
    """Write the captured graph itself.

    Raises:
        OSError: it cannot be written.
    """
    exported = capture.exported if device == "cpu" else move_to_device_pass(capture.exported, device)
    archive.save(exported, folder / TORCH_FILE)
    file = File.of(folder / TORCH_FILE)
    engine = EngineFile(kind="torch", **file.model_dump(), device=device, dtype=capture.dtype)
    return Written(engine, capture.program, capture.lowering, True, {})


def write_tensorrt(
    capture: Capture,
    folder: Path,
    flavor: Literal["tensorrt", "tensorrt_rtx"],
    *,
    slots: int,
    alias: Kind | None,
    strict: bool,
    compute_capability: str | None,
) -> Written:
    """Compile the captured graph and write the plan, and beside it the weights that it takes as inputs.

    Raises:
        BuildError: it cannot be compiled.
        LoadError: TensorRT is not installed.
        OSError: it cannot be written.
    """
    from inplace.trt import load_tensorrt
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from inplace_builder.lower.plan import build_plan

    tensorrt = load_tensorrt(flavor)
    targets = () if compute_capability is None else ("SM" + compute_capability.replace(".", ""),)
    built = build_plan(capture, tensorrt, slots=slots, alias=alias, strict=strict, compute_capabilities=targets)
    (folder / PLAN_FILE).write_bytes(built.plan)
    weights = None
    if built.weights:
        try:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in built.weights.items()}, folder / WEIGHTS_FILE)
        except SafetensorError as error:  # a full disk among others
            raise OSError(str(error)) from error
        weights = File.of(folder / WEIGHTS_FILE)
    here = compute_capability is None
    plan = Plan(
        flavor=flavor,
        version=tensorrt.api.__version__,
        gpu=torch.cuda.get_device_name() if here else "",
        compute_capability="{}.{}".format(*torch.cuda.get_device_capability()) if here else str(compute_capability),
        profiles=built.profiles,
        weights=weights,
    )
    file = File.of(folder / PLAN_FILE)
    engine = EngineFile(kind="tensorrt", **file.model_dump(), device="cuda", dtype=capture.dtype, plan=plan)
    notes = {flavor: tensorrt.api.__version__, "weights_in_plan_bytes": str(built.baked)}
    return Written(engine, built.program, built.lowering, here, notes)
