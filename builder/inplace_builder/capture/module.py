"""Frontend for modules that are written on the operators: ``forward(*inputs, *states)`` with descriptions of both."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from inplace.schema.dtypes import Dtype
from inplace.schema.served import Program
from inplace.schema.specs import Role, StateSpec, TensorSpec, Update
from torch import Tensor
from torch.export import Dim

from inplace_builder.capture.capture import Capture, described
from inplace_builder.errors import BuildError
from inplace_builder.graph.reexport import any_size


def capture_module(
    module: torch.nn.Module,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    states: Sequence[StateSpec],
    *,
    max_rows: int,
) -> Capture:
    """Export a rectangular module: each step takes one entry of every input a row.

    Args:
        module: its ``forward`` takes the inputs, ``[rows, *shape]`` each, then the states, ``[slots, *shape]`` each, by these names,
            and returns the outputs, ``[rows, *shape]`` each; it touches the states through ``inplace.operators`` only.
        inputs: what a client sends (role ``row``) and what the runtime fills.
        outputs: what it returns.
        states: what it keeps.
        max_rows: most rows of one step, at least 2.

    Raises:
        BuildError: torch.export cannot capture it, or it touches a state outside the operators.
    """
    module = module.eval()
    rows = Dim("rows", min=1, max=max_rows)
    arguments = [torch.zeros((2, *spec.shape), dtype=spec.dtype.as_torch) for spec in inputs]
    tensors = [
        torch.full((2, *spec.shape), spec.fill, dtype=spec.dtype.as_torch) for spec in states
    ]
    slots = Dim("slots", min=1)
    shapes: tuple[Any, ...] = (*({0: rows} for _ in inputs), *({0: slots} for _ in states))
    try:
        with torch.no_grad(), any_size():
            exported = torch.export.export(module, (*arguments, *tensors), dynamic_shapes=shapes)
    except Exception as error:
        raise BuildError(f"torch.export cannot capture {type(module).__name__}: {error}") from error
    program = Program(
        name="step",
        row_layout="rectangular",
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        aliases=(),
        max_rows=max_rows,
        chunk=1,
    )
    program, lowering = described(exported, program, tuple(states))

    def reference(requests: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        memory = [
            torch.full((1, *spec.shape), spec.fill, dtype=spec.dtype.as_torch) for spec in states
        ]
        results: tuple[Tensor, ...] = ()
        with torch.no_grad():
            for index, request in enumerate(requests):
                found = module(*(_alone(spec, request, index) for spec in inputs), *memory)
                results = found if isinstance(found, tuple) else (found,)
        return {spec.name: result[0] for spec, result in zip(outputs, results, strict=True)}

    ends = [
        spec.shape[spec.axis]
        for spec in states
        if spec.update is Update.APPEND and spec.axis is not None
    ]
    weights = next((Dtype.of(p.dtype) for p in module.parameters()), states[0].dtype)
    return Capture(
        exported, program, tuple(states), min(ends, default=None), weights, lowering, reference
    )


def _alone(spec: TensorSpec, request: Mapping[str, Tensor], index: int) -> Tensor:
    """The input of a sequence that is alone in slot 0, at its ``index``-th request."""
    match spec.role:
        case Role.ROW:
            return request[spec.name][None]
        case Role.SLOTS:
            return torch.zeros(1, dtype=spec.dtype.as_torch)
        case Role.WRITE_INDICES | Role.POSITIONS:
            return torch.full((1,), index, dtype=spec.dtype.as_torch)
        case _:
            raise BuildError(
                f"input {spec.name} has the role {spec.role}, which a rectangular program does not take"
            )
