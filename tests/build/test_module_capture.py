"""Modules written on the operators: captured, or refused with the module's own line."""

import re
from pathlib import Path

import pytest
import torch
from inplace.operators import read, update
from inplace.runtime.instance import ModelInstance
from inplace.runtime.requests import Request
from inplace_builder.errors import BuildError
from inplace_builder.served.build import write_engine
from inplace_builder.served.options import BuildOptions
from support.models import accumulator, captured, open_instance
from torch import Tensor

OPTIONS = BuildOptions(slots=4, max_rows=4, capacity=1)


class Returns(torch.nn.Module):
    def forward(self, value: Tensor, slots: Tensor, total: Tensor) -> Tensor:
        update(total, slots, read(total, slots) + value)
        return total


class Indexes(torch.nn.Module):
    def forward(self, value: Tensor, slots: Tensor, total: Tensor) -> Tensor:
        sums = total[slots] + value
        update(total, slots, sums)
        return sums


class Views(torch.nn.Module):
    def forward(self, value: Tensor, slots: Tensor, total: Tensor) -> Tensor:
        sums = read(total, slots) + value
        update(total.view(-1, 4), slots, sums)
        return sums


class Scales(torch.nn.Module):
    def forward(self, value: Tensor, slots: Tensor, total: Tensor) -> Tensor:
        sums = read(total, slots) + value
        update(total, slots, sums)
        total.mul_(0.5)
        return sums


class OnlyReads(torch.nn.Module):
    def forward(self, value: Tensor, slots: Tensor, total: Tensor) -> Tensor:
        return read(total, slots) + value


class Ignores(torch.nn.Module):
    def forward(self, value: Tensor, slots: Tensor, total: Tensor) -> Tensor:
        return value * 2


class Branches(torch.nn.Module):
    def forward(self, value: Tensor, slots: Tensor, total: Tensor) -> Tensor:
        if value.sum() > 0:
            value = value * 2
        update(total, slots, value)
        return value


class OtherDtype(torch.nn.Module):
    def forward(self, value: Tensor, slots: Tensor, total: Tensor) -> Tensor:
        update(total, slots, value.double())
        return value


class ReturnsTwo(torch.nn.Module):
    def forward(self, value: Tensor, slots: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        sums = read(total, slots) + value
        update(total, slots, sums)
        return sums, value * 2


class ReturnsNothing(torch.nn.Module):
    def forward(self, value: Tensor, slots: Tensor, total: Tensor) -> tuple[()]:
        update(total, slots, read(total, slots) + value)
        return ()


def add(
    instance: ModelInstance, rows: dict[int, float], *, start: bool = False
) -> dict[int, tuple[list[float], int]]:
    """One step of the accumulator: a value for each sequence, to its sum and count."""
    requests = [
        Request(sequence, start, end=False, inputs={"value": torch.full((1, 4), value)})
        for sequence, value in rows.items()
    ]
    admitted = [instance.admit(request) for request in requests]
    instance.step(admitted)
    for active in admitted:
        instance.finish(active)
    return {
        int(active.request.sequence_id): (
            active.outputs["sum"][0].tolist(),
            int(active.outputs["values"]),
        )
        for active in admitted
    }


def test_the_accumulator_builds_and_each_sequence_has_its_own_sum(tmp_path: Path) -> None:
    manifest = write_engine(accumulator(), tmp_path / "accumulator", OPTIONS)
    assert manifest.capacity is None
    assert [(alias.output, alias.input) for alias in manifest.program("step").aliases] == [
        ("total_updated", "total"),
        ("count_updated", "count"),
    ]
    instance = open_instance(tmp_path / "accumulator")
    add(instance, {1: 1.0, 2: 10.0, 3: 100.0}, start=True)
    assert add(instance, {3: 1.0, 1: 5.0}) == {3: ([101.0] * 4, 2), 1: ([6.0] * 4, 2)}
    assert add(instance, {2: 1.0}) == {2: ([11.0] * 4, 2)}
    assert add(instance, {1: 2.0}, start=True) == {1: ([2.0] * 4, 1)}


def test_a_module_that_returns_a_state_is_refused() -> None:
    with pytest.raises(BuildError, match="state total is returned by the model"):
        captured(Returns())


@pytest.mark.parametrize(
    ("module", "operator", "line"),
    [
        (Indexes(), "aten.index.Tensor", "sums = total[slots] + value"),
        (Views(), "aten.view.default", "update(total.view(-1, 4), slots, sums)"),
        (Scales(), "aten.mul_.Tensor", "total.mul_(0.5)"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, torch.nn.Module) else "",
)
def test_a_state_used_outside_the_operators_is_refused_with_the_module_s_own_line(
    module: torch.nn.Module, operator: str, line: str
) -> None:
    number = next(
        n
        for n, text in enumerate(Path(__file__).read_text().splitlines(), 1)
        if text.strip() == line
    )
    where = f'state total is used by {operator} at "{__file__}", line {number}, in forward ({line})'
    with pytest.raises(BuildError, match=re.escape(where)):
        captured(module)


@pytest.mark.parametrize(
    "module", [OnlyReads(), Ignores()], ids=lambda module: type(module).__name__
)
def test_a_state_that_is_never_written_is_refused_by_name(module: torch.nn.Module) -> None:
    with pytest.raises(BuildError, match=r"the model never writes \['total'\]"):
        captured(module)


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (Branches(), r"if value\.sum\(\) > 0"),
        (OtherDtype(), "value is torch.float64, the state is torch.float32"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, torch.nn.Module) else "",
)
def test_a_module_that_torch_cannot_export_is_refused_with_the_cause(
    module: torch.nn.Module, text: str
) -> None:
    with pytest.raises(
        BuildError, match=f"(?s)torch.export cannot capture {type(module).__name__}: .*{text}"
    ):
        captured(module)


@pytest.mark.parametrize(
    ("module", "count"),
    [(ReturnsTwo(), 2), (ReturnsNothing(), 0)],
    ids=lambda value: type(value).__name__,
)
def test_a_module_that_returns_more_or_less_than_its_description_names_is_refused(
    module: torch.nn.Module, count: int
) -> None:
    with pytest.raises(
        BuildError, match=rf"returns {count} outputs, but its description has \['sum'\]"
    ):
        captured(module)
