"""A small module of one operator with its inputs, and many of them as one network."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from inplace_builder.graph.export import correct_lstm, size_oblivious
from inplace_builder.lower.compile import Range
from torch import Tensor, nn
from torch.export import Dim

aten = torch.ops.aten
F, H, B16, I32, I64, BOOL = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int32,
    torch.int64,
    torch.bool,
)
N_RANGE, M_RANGE = (1, 16), (1, 8)
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Absolute and relative, by the dtype of the result: a few units in the last place, TF32 off."""
SMALL, LARGE = {"n": 3, "m": 2}, {"n": 7, "m": 5}


@dataclass(frozen=True)
class Arg:
    """An input: its extents (``"n"`` and ``"m"`` vary), its dtype and the range of its values."""

    shape: tuple[int | str, ...]
    dtype: torch.dtype = torch.float32
    low: float = -2.0
    high: float = 2.0

    def make(self, sizes: dict[str, int], generator: torch.Generator) -> Tensor:
        shape = self.sized(sizes)
        if self.dtype.is_floating_point:
            return (torch.rand(shape, generator=generator) * (self.high - self.low) + self.low).to(
                self.dtype
            )
        if self.dtype == torch.bool:
            return torch.rand(shape, generator=generator) < 0.5
        return torch.randint(int(self.low), int(self.high), shape, generator=generator).to(
            self.dtype
        )

    def sized(self, sizes: dict[str, int]) -> tuple[int, ...]:
        return tuple(sizes[extent] if isinstance(extent, str) else extent for extent in self.shape)


X, Z, TWO = Arg(("n", 8)), Arg(("n", 4, 8)), Arg(("n", "m", 8))
POSITIVE = Arg(("n", 8), low=0.25, high=4.0)
WHOLE, POSITIVE_WHOLE = Arg(("n", 8), I64, -4, 5), Arg(("n", 8), I64, 1, 9)
WHOLE_32 = Arg(("n", 8), I32, -9, 9)
TRUTH = Arg(("n", 8), BOOL)
"""Inputs that many cases have; the upper end of whole numbers is excluded."""


@dataclass(frozen=True, eq=False)
class Case:
    """A module and its inputs."""

    name: str
    module: nn.Module
    inputs: tuple[Arg, ...]

    def examples(self, sizes: dict[str, int]) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(len(self.name))
        return tuple(arg.make(sizes, generator) for arg in self.inputs)

    def check(self, run: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> None:
        """Compare the outputs of ``run``, named ``out_0`` etc., with PyTorch's at two sizes."""
        for sizes in (SMALL, LARGE):
            inputs = self.examples(sizes)
            results = run({f"xs_{index}": x for index, x in enumerate(inputs)})
            self.compare(inputs, [results[name] for name in self.outputs])

    def compare(self, inputs: tuple[Tensor, ...], outputs: Sequence[Tensor]) -> None:
        """Compare these outputs with PyTorch's for the inputs."""
        for actual, expected in zip(outputs, self.results(inputs), strict=True):
            limit = TOLERANCE.get(expected.dtype, 0.0)
            torch.testing.assert_close(
                actual.cpu(), expected, rtol=limit, atol=limit, equal_nan=True
            )

    def results(self, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        """PyTorch's outputs."""
        with torch.no_grad():
            result = self.module(*inputs)
        return list(result) if isinstance(result, list | tuple) else [result]

    @property
    def outputs(self) -> list[str]:
        return [f"out_{index}" for index in range(len(self.exported.graph_signature.user_outputs))]

    @cached_property
    def exported(self) -> torch.export.ExportedProgram:
        dims: dict[int | str, Any] = {
            "n": Dim("n", min=N_RANGE[0], max=N_RANGE[1]),
            "m": Dim("m", min=M_RANGE[0], max=M_RANGE[1]),
        }
        shapes = tuple(
            {axis: dims[extent] for axis, extent in enumerate(arg.shape) if isinstance(extent, str)}
            for arg in self.inputs
        )
        with torch.no_grad(), correct_lstm(), size_oblivious():
            return torch.export.export(self.module, self.examples(SMALL), dynamic_shapes=(shapes,))

    def profile(self) -> dict[str, Range]:
        ends = {"n": N_RANGE, "m": M_RANGE}
        least, most = ({name: ends[name][end] for name in ends} for end in (0, 1))
        return {
            f"xs_{i}": (arg.sized(least), arg.sized(SMALL), arg.sized(most))
            for i, arg in enumerate(self.inputs)
        }


class Call(nn.Module):
    """A function of tensors as a module; ``parts`` are the modules and parameters it may use."""

    def __init__(
        self, function: Callable[..., Any], **parts: nn.Module | nn.Parameter | Tensor
    ) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        self.parts = tuple(parts)

    def forward(self, *xs: Tensor) -> Any:
        return self.function(*xs, **{name: getattr(self, name) for name in self.parts})


class Together(nn.Module):
    """Several modules in one: their inputs and their outputs concatenated."""

    def __init__(self, cases: Sequence[Case]) -> None:
        super().__init__()
        self.cases = tuple(cases)
        self.modules_of_cases = nn.ModuleList(case.module for case in cases)

    def forward(self, *xs: Tensor) -> list[Tensor]:
        results: list[Tensor] = []
        for case in self.cases:
            results += case.results(xs[: len(case.inputs)])
            xs = xs[len(case.inputs) :]
        return results


@dataclass(frozen=True, eq=False)
class Batch:
    """Cases that share a network: TensorRT takes seconds to build one, however small."""

    cases: tuple[Case, ...]

    @cached_property
    def case(self) -> Case:
        """All of them as one."""
        return Case(
            "together",
            Together(self.cases),
            tuple(arg for case in self.cases for arg in case.inputs),
        )

    def run(
        self, run: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]
    ) -> dict[str, list[tuple[tuple[Tensor, ...], list[Tensor]]]]:
        """For each case its inputs and the outputs of ``run``, at two sizes; see `Case.compare`."""
        parts: dict[str, list[tuple[tuple[Tensor, ...], list[Tensor]]]] = {
            case.name: [] for case in self.cases
        }
        for sizes in (SMALL, LARGE):
            inputs = self.case.examples(sizes)
            results = run({f"xs_{index}": x for index, x in enumerate(inputs)})
            outputs = [results[name] for name in self.case.outputs]
            for case in self.cases:
                own, inputs = inputs[: len(case.inputs)], inputs[len(case.inputs) :]
                count = len(case.results(own))
                parts[case.name].append((own, outputs[:count]))
                outputs = outputs[count:]
        return parts


def op(overload: Any, *arguments: Any, name: str = "", **keywords: Any) -> Case:
    """One operator on inputs (`Arg`) and constants; a list may have inputs too."""
    inputs: list[Arg] = []

    def place(argument: Any) -> Any:
        if isinstance(argument, Arg):
            inputs.append(argument)
            return len(inputs) - 1
        nested = isinstance(argument, list) and any(isinstance(each, Arg) for each in argument)
        return [place(each) for each in argument] if nested else (argument,)

    places = [place(argument) for argument in arguments]

    def fill(where: Any, xs: tuple[Tensor, ...]) -> Any:
        if isinstance(where, int):
            return xs[where]
        return [fill(each, xs) for each in where] if isinstance(where, list) else where[0]

    def call(*xs: Tensor) -> Any:
        return overload(*(fill(where, xs) for where in places), **keywords)

    kinds = {str(arg.dtype).removeprefix("torch.") for arg in inputs} - {"float32"}
    title = name or "-".join([str(overload), *sorted(kinds)])
    return Case(title, Call(call), tuple(inputs))


def fn(
    name: str,
    function: Callable[..., Any],
    *inputs: Arg,
    **parts: nn.Module | nn.Parameter | Tensor,
) -> Case:
    """A function of inputs and parts."""
    return Case(name, Call(function, **parts).eval(), inputs)
