"""Calls of programs in 16 bits: another token is right only where rounding explains it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from inplace.schema.schedule import Call
from inplace.schema.served import Manifest
from inplace.schema.specs import Dtype, Role
from inplace_builder import BuildError, BuildOptions, RowOptions, capture_programs, write_engine
from inplace_builder.capture.programs import ProgramsCapture
from inplace_builder.served.verify_calls import CallComparison
from torch import Tensor, nn

TOKENS = 32


class Chooses(nn.Module):
    """The token with the largest score; the scores follow what is fed."""

    scores: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scores", torch.zeros(1, TOKENS, dtype=torch.bfloat16))
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64))
        self.mix = nn.Linear(TOKENS, TOKENS, bias=False, dtype=torch.bfloat16)
        nn.init.eye_(self.mix.weight)

    def forward(self, value: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.mix(self.scores)
        self.scores.copy_(torch.lerp(self.scores, value.bfloat16(), 0.5))
        self.count.add_(1)
        return scores.argmax(-1), self.count >= 3


@pytest.fixture(scope="module")
def capture() -> ProgramsCapture:
    options = RowOptions(
        max_rows=2,
        outputs=("tokens", "done"),
        roles={"tokens": Role.TOKENS, "done": Role.DONE},
    )
    example = (torch.zeros(1, TOKENS),)
    return capture_programs({"choose": (Chooses(), options, example)}, [Call(program="choose")])


@pytest.fixture(scope="module")
def manifest(capture: ProgramsCapture, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    options = BuildOptions(dtype=Dtype.BFLOAT16, slots=2, max_rows=2)
    return write_engine(capture, tmp_path_factory.mktemp("calls") / "chooses", options)


Changed = Callable[[dict[str, Tensor], dict[str, Tensor]], None]


def compared(capture: ProgramsCapture, manifest: Manifest, change: Changed) -> CallComparison:
    """Compare a call whose scores have two largest entries, 7 and 5, one rounding apart."""
    rows, names = capture.modules["choose"]
    scores = torch.linspace(-1, 0, TOKENS).bfloat16()
    scores[7], scores[5] = 2.0 + 2**-6, 2.0
    before = {"scores": scores, "count": torch.tensor([1])}
    inputs = {"value": torch.linspace(0, 1, TOKENS)[None]}
    shapes = [state.tensor.initial.shape for state in rows.states]
    given = [before[name].reshape(shape) for name, shape in zip(names, shapes, strict=True)]
    outputs, new = rows.call(inputs, given)
    after = dict(zip(names, (tensor.clone() for tensor in new), strict=True))
    change(outputs, after)
    comparison = CallComparison(manifest, capture)
    comparison.compare(manifest.programs[0], inputs, before, outputs, after)
    return comparison


def test_an_engine_in_16_bits_says_how_many_calls_rounding_decided(manifest: Manifest) -> None:
    ties, calls = map(int, manifest.built_with["verified_ties"].split(" of "))
    assert ties <= calls
    assert calls >= 12
    assert int(manifest.built_with["verified_tokens"]) > 1


def test_the_modules_own_token_is_no_tie(capture: ProgramsCapture, manifest: Manifest) -> None:
    def same(outputs: dict[str, Tensor], after: dict[str, Tensor]) -> None:
        assert outputs["tokens"].tolist() == [7]

    comparison = compared(capture, manifest, same)
    assert (comparison.num_calls, comparison.num_ties, comparison.max_error) == (1, 0, 0.0)


def test_a_token_that_rounding_explains_is_a_tie(
    capture: ProgramsCapture, manifest: Manifest
) -> None:
    def other(outputs: dict[str, Tensor], after: dict[str, Tensor]) -> None:
        outputs["tokens"] = torch.tensor([5])

    comparison = compared(capture, manifest, other)
    assert (comparison.num_calls, comparison.num_ties) == (1, 1)
    assert comparison.max_error < 1e-2


@pytest.mark.parametrize("what", ["token", "flag", "counter", "state"])
def test_what_rounding_does_not_explain_is_refused(
    what: str, capture: ProgramsCapture, manifest: Manifest
) -> None:
    def wrong(outputs: dict[str, Tensor], after: dict[str, Tensor]) -> None:
        if what == "token":
            outputs["tokens"] = torch.tensor([6])
        elif what == "flag":
            outputs["done"] = ~outputs["done"]
        elif what == "counter":
            after["count"] = after["count"] + 1
        else:
            after["scores"] = after["scores"] * 1.2

    message = "differs from the model" if what == "state" else "no rounding explains"
    with pytest.raises(BuildError, match=message):
        compared(capture, manifest, wrong)


def test_tokens_in_float32_are_compared_exactly(tmp_path: Path) -> None:
    options = RowOptions(max_rows=2, outputs=("tokens",), roles={"tokens": Role.TOKENS})

    class Largest(nn.Module):
        last: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("last", torch.zeros(1, dtype=torch.int64))

        def forward(self, value: Tensor) -> Tensor:
            self.last.copy_(value.argmax(-1))
            return self.last.clone()

    programs = {"largest": (Largest(), options, (torch.zeros(1, TOKENS),))}
    captured = capture_programs(programs, [Call(program="largest")])
    written = write_engine(captured, tmp_path / "largest", BuildOptions(slots=2, max_rows=2))
    assert "verified_ties" not in written.built_with
