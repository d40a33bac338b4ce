"""The engine file is written piece by piece, can be read, and a full disk is an error."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from inplace.schema.artifacts import Plan, Profile
from inplace.schema.graph import METADATA
from inplace.schema.specs import Dtype
from inplace_builder.engine_files import write_plan
from inplace_builder.graph.program import move_to_device
from inplace_builder.graph.writer import save_graphs
from support.engine_graph import load_graph

pytestmark = pytest.mark.slow

LAYERS, WIDTH = 16, 2048


def exported(layers: int, width: int) -> torch.export.ExportedProgram:
    """A stack of linear layers without a bias."""
    module = torch.nn.Sequential(
        *(torch.nn.Linear(width, width, bias=False) for _ in range(layers))
    )
    with torch.no_grad():
        return torch.export.export(module.eval(), (torch.zeros(1, width),))


def test_what_is_saved_loads_and_computes_the_same(tmp_path: Path) -> None:
    program = exported(2, 8)
    save_graphs({METADATA: program}, tmp_path / "engine.safetensors")
    value = torch.randn(1, 8)
    (result,) = load_graph(tmp_path / "engine.safetensors").module(value)
    assert torch.equal(result, program.module()(value))


class MakesTensors(torch.nn.Module):
    """Calls that name a device, as arguments of each kind."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        at = torch.arange(x.shape[1], device=x.device)
        wide = x.to(device=x.device, dtype=torch.float64) + torch.zeros_like(x)
        made = torch.full((1, x.shape[1]), 2.0, device=torch.device("cpu"))
        return (wide * made.to("cpu") + at).to(x.device, torch.float32)


def test_a_program_that_was_moved_to_another_device_can_be_loaded(tmp_path: Path) -> None:
    module, value = MakesTensors(), torch.randn(1, 8)
    program = move_to_device(torch.export.export(module, (value,)), "cpu")
    save_graphs({METADATA: program}, tmp_path / "engine.safetensors")
    (result,) = load_graph(tmp_path / "engine.safetensors").module(value)
    assert torch.equal(result, module(value))
    moved = move_to_device(torch.export.export(module, (value,)), "meta")
    devices = [
        argument
        for node in moved.graph.nodes
        for argument in (*node.args, *node.kwargs.values())
        if isinstance(argument, (torch.device, str))
    ]
    assert devices
    assert set(devices) == {torch.device("meta")}


def peak_growth(folder: Path) -> None:
    """Print by how many bytes saving raised this process' peak memory, and the file's size."""
    program, path = exported(LAYERS, WIDTH), folder / "engine.safetensors"
    save_graphs({METADATA: exported(1, 1)}, path)  # what is imported and allocated once
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    save_graphs({METADATA: program}, path)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024, path.stat().st_size)


def test_no_copy_of_the_weights_is_held_in_memory(tmp_path: Path) -> None:
    code = f"import test_engine_files as t; t.peak_growth(t.Path({str(tmp_path)!r}))"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join(
                [str(Path(__file__).parent), str(Path(__file__).parents[1])]
            )
        },
        capture_output=True,
        text=True,
        check=True,
    )
    growth, size = map(int, run.stdout.split())
    assert size > LAYERS * WIDTH * WIDTH * 4
    assert growth < 0.25 * size


def test_a_file_that_cannot_be_opened_or_written_is_an_error(tmp_path: Path) -> None:
    program = exported(1, 8)
    with pytest.raises(FileNotFoundError):
        save_graphs({METADATA: program}, tmp_path / "nowhere" / "engine.safetensors")
    with pytest.raises(OSError, match="No space left on device"):
        save_graphs({METADATA: program}, Path("/dev/full"))


def test_programs_with_the_same_weights_have_one_file_of_them(tmp_path: Path) -> None:
    record = Plan(
        flavor="tensorrt",
        version="10.15",
        gpu="",
        compute_capability="9.0",
        profiles=(Profile(rows=(1, 1), tokens=(1, 1)),),
    )
    weights = {"a": torch.arange(4.0), "b": torch.ones(2)}
    written: dict[str, dict[str, torch.Tensor]] = {}
    for name, last in (("one", 1.0), ("two", 1.0), ("three", 0.0)):
        own = {"a": weights["a"].clone(), "b": weights["b"] * last}
        files = f"{name}.plan", f"{name}.weights"
        engine = write_plan(b"plan", record, own, tmp_path, Dtype.FLOAT32, files, written)
        assert engine.plan is not None
        assert engine.plan.weights is not None
        written[engine.plan.weights] = own
    assert list(written) == ["one.weights", "three.weights"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "one.plan", "one.weights", "three.plan", "three.weights", "two.plan"
    ]  # fmt: skip
