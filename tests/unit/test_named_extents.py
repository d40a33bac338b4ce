"""An export that fixes an extent which varies names the model's line."""

from collections.abc import Callable

import pytest
import torch
from inplace_builder.graph.export import ExtentError, named_extents, size_oblivious
from torch import Tensor, nn
from torch.export import Dim


class Module(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.function(x, y)


def export(function: Callable[[Tensor, Tensor], Tensor]) -> torch.export.ExportedProgram:
    """Export with as many rows in x as in y, 1 to 24."""
    rows = {0: Dim("rows", min=1, max=24)}
    with size_oblivious(), named_extents():
        return torch.export.export(
            Module(function), (torch.ones(4, 3), torch.ones(4, 3)), dynamic_shapes=(rows, rows)
        )


def branches(x: Tensor, y: Tensor) -> Tensor:
    if x.shape[0] == 1:
        return x
    return x + y


def loops(x: Tensor, y: Tensor) -> Tensor:
    for row in range(x.shape[0]):
        y = y + x[row]
    return y


def chunks(x: Tensor, y: Tensor) -> Tensor:
    return x + y if x.shape[0] % 8 else x


@pytest.mark.parametrize(
    ("function", "condition", "line"),
    [
        (branches, r"x\.shape\[0\] != 1", r"if x\.shape\[0\] == 1:"),
        (loops, r"x\.shape\[0\] == 4", r"for row in range\(x\.shape\[0\]\):"),
        (chunks, r"Mod\(x\.shape\[0\], 8\) != 0", r"return x \+ y if x\.shape\[0\] % 8 else x"),
    ],
)
def test_the_condition_and_the_line_are_named(
    function: Callable[[Tensor, Tensor], Tensor], condition: str, line: str
) -> None:
    expected = rf'{condition} at ".*test_named_extents\.py", line \d+, in .* \({line}\); '
    with pytest.raises(ExtentError, match=expected + r"the extent varies \(up to 24\)"):
        export(function)


def test_extents_that_must_be_equal_are_no_finding() -> None:
    export(lambda x, y: (x + y).clone())
