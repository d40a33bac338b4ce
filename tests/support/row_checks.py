"""Step a module's rows beside the module itself, one of it for each sequence."""

from pathlib import Path

import torch
from inplace.runtime.instance import ModelInstance
from inplace.runtime.requests import Request
from inplace.schema.specs import Role, StateSpec, TensorSpec
from inplace.trt import TensorRT
from inplace_builder import BuildOptions, RowOptions, capture_exported_rows
from inplace_builder.capture.capture import Capture
from inplace_builder.lower import choose_mechanisms, lower, lowerable
from inplace_builder.served.build import write_engine
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from support.models import open_instance
from support.network_interpreter import interpret
from support.row_cases import RowCase

ROWS, SLOTS, STEPS = 3, 5, 20


def check_rows(case: RowCase, folder: Path) -> Capture:
    """Three sequences of a case, interleaved, with NaN in all slots that are not theirs.

    Returns:
        The capture.
    """
    own = [(_module(case), case.states()) for _ in range(ROWS)]
    with torch.no_grad():
        capture = capture_exported_rows(
            _module(case),
            RowOptions(ROWS + 1, **case.options),
            (case.input(0, 0), *case.states()),
            **case.capture,
        )
    write_engine(capture, folder / "rows", BuildOptions(slots=SLOTS, max_rows=ROWS + 1))
    instance = open_instance(folder / "rows")
    steps = [0] * ROWS
    for step in range(STEPS):
        rows = [row for row in range(ROWS) if step >= row and (step + row) % 4]
        admitted = {
            row: instance.admit(
                Request(row + 1, not steps[row], False, _inputs(capture, case, steps[row], row))
            )
            for row in rows
        }
        if not admitted:
            continue
        _spoil_others(instance)
        instance.step(list(admitted.values()))
        for row, active in admitted.items():
            assert active.error is None, active.error
            expected = _eager(*own[row], case.input(steps[row], row), len(capture.program.outputs))
            for spec, tensor in zip(capture.program.outputs, expected, strict=True):
                torch.testing.assert_close(active.outputs[spec.name].reshape(tensor.shape), tensor)
            instance.finish(active)
            steps[row] += 1
    assert min(steps) > STEPS // 2
    return capture


def check_network(capture: Capture, case: RowCase, tensorrt: TensorRT) -> None:
    """The same sequences through the network for TensorRT, which is interpreted in PyTorch.

    Raises:
        LoweringError: the network cannot be made.
    """
    records = choose_mechanisms(
        capture.exported.graph, capture.states, tensorrt, order=("kv_cache_update", "copy")
    )
    network = lower(
        lowerable(capture.exported),
        outputs=[spec.name for spec in capture.program.outputs],
        states=capture.states,
        kinds={record.state: record.kind for record in records},
        tensorrt=tensorrt,
    )
    own = [(_module(case), case.states()) for _ in range(ROWS)]
    memory = {state.name: _fresh(capture, state) for state in capture.states}
    steps = [0] * ROWS
    for step in range(STEPS // 2):
        rows = [row for row in range(ROWS) if step >= row and (step + row) % 4]
        if not rows:
            continue
        given = {
            spec.name: _given(spec, [case.input(steps[row], row) for row in rows], steps, rows)
            for spec in capture.program.inputs
        }
        outputs = interpret(network, given | {name: x[rows] for name, x in memory.items()})
        for name, output in network.state_outputs.items():
            memory[name][rows] = outputs[output]
        for index, row in enumerate(rows):
            expected = _eager(*own[row], case.input(steps[row], row), len(capture.program.outputs))
            for spec, tensor in zip(capture.program.outputs, expected, strict=True):
                actual = outputs[spec.name][index].reshape(tensor.shape)
                torch.testing.assert_close(actual, tensor, rtol=1e-4, atol=1e-5)
            steps[row] += 1


def _module(case: RowCase) -> nn.Module:
    """The module of a case, with the same weights each time and no copy: hooks refer to it."""
    torch.manual_seed(0)
    return case.module()


def _fresh(capture: Capture, state: StateSpec) -> Tensor:
    """What the slots of all rows hold before their first step."""
    if state.initial is not None:
        return capture.initial[state.initial].expand(ROWS, *state.shape).clone()
    fill = state.fill if state.reset else float("nan")
    return torch.full((ROWS, *state.shape), fill, dtype=state.dtype.as_torch)


def _given(spec: TensorSpec, inputs: list[Tensor], steps: list[int], rows: list[int]) -> Tensor:
    match spec.role:
        case Role.SLOTS:
            return torch.arange(len(rows), dtype=torch.int32)
        case Role.ROW:
            return torch.stack([x.reshape(spec.shape) for x in inputs])
        case role:
            raise AssertionError(f"no such input: {role}")


def _inputs(capture: Capture, case: RowCase, step: int, row: int) -> dict[str, Tensor]:
    spec = capture.program.inputs[0]
    return {spec.name: case.input(step, row).reshape(1, *spec.shape)}


def _eager(module: nn.Module, states: list[Tensor], x: Tensor, outputs: int) -> list[Tensor]:
    """One step of a sequence alone; new states that are returned are kept for the next."""
    with torch.no_grad():
        returned = [leaf for leaf in pytree.tree_leaves(module(x, *states)) if leaf is not None]
    if states:
        states[:] = returned[outputs:]
    return [tensor.clone() for tensor in returned[:outputs]]


def _spoil_others(instance: ModelInstance) -> None:
    """Fill what no sequence owns: what a row reads of it would show in its outputs."""
    occupied = {
        instance.table.find(row + 1).slot for row in range(ROWS) if instance.table.get(row + 1)
    }
    for tensor in instance.arena.tensors.values():
        for slot in range(SLOTS):
            if slot not in occupied:
                tensor[slot].fill_(float("nan") if tensor.is_floating_point() else 99)
