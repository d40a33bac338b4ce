"""Graphs become functional and are decomposed before they are lowered, and compute the same."""

import math
import sys
from collections.abc import Callable

import pytest
import torch
from inplace.trt import TensorRT, load_tensorrt
from inplace_builder.errors import BuildError
from inplace_builder.graph.in_place import writes_in_place
from inplace_builder.graph.nodes import ConstantValues
from inplace_builder.lower import lower, lowerable
from inplace_builder.lower.own_decompositions import OWN
from support.network_interpreter import interpret
from support.operator_case import Arg, Case, fn
from torch import Tensor, nn

aten = torch.ops.aten
X, Z, SQUARE = Arg(("n", 8)), Arg(("n", 4, 8)), Arg((4, 4))


@pytest.fixture(scope="module")
def rtx() -> TensorRT:
    return load_tensorrt("tensorrt_rtx")


def views(x: Tensor) -> Tensor:
    x = x.clone()
    part, row = x[:, 1:3], x[:, 0]
    part.mul_(2)
    row += 1
    part[:, 0, :4].zero_()
    return torch.cat([x, part, row[:, None]], 1)


def reshaped_views(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x * 1
    flat = x.view(x.shape[0], 32)
    turned = x.transpose(1, 2).permute(0, 2, 1)[..., None].squeeze(-1)
    flat[:, 5:9] = 3.0
    turned.clamp_(max=1.0)
    return flat + 0, turned + x


def pieces(x: Tensor) -> Tensor:
    x = x + 0
    left, right = x.chunk(2, 1)
    left.add_(right, alpha=2)
    for one in right.unbind(1)[:2]:
        one.neg_()
    x[:, 2:4] += x[:, 0:2].clone()
    x.narrow(1, 1, 2).fill_(0.5)
    return x


def of_a_copy(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x + 0
    copied = x.transpose(1, 2).reshape(x.shape[0], -1)
    copied.add_(1)
    same = x.contiguous()
    same.mul_(3)
    return x, copied


def masks(x: Tensor) -> Tensor:
    x = x.clone()
    mask = x > 0
    mask.logical_not_()
    x.masked_fill_(mask, -1.0)
    x.index_put_([torch.tensor([0])], torch.tensor(2.0))
    x[:, 3].mul_(torch.arange(8.0))
    whole = torch.empty_like(x).copy_(x[:, 3:4])
    return torch.sub(x, whole, out=torch.empty_like(x))


def diagonal(x: Tensor) -> Tensor:
    x = x.clone()
    x.diagonal().add_(1)
    return x


IN_PLACE = [
    fn("views", views, Z),
    fn("reshaped-views", reshaped_views, Z),
    fn("pieces", pieces, Z),
    fn("of-a-copy", of_a_copy, Z),
    fn("masks", masks, Z),
    fn("diagonal", diagonal, SQUARE),
]


@pytest.mark.parametrize("case", IN_PLACE, ids=lambda case: case.name)
def test_what_is_written_in_place_becomes_a_value(rtx: TensorRT, case: Case) -> None:
    assert any(map(writes_in_place, case.exported.graph.nodes))
    program = lowerable(case.exported)
    assert not any(map(writes_in_place, program.graph.nodes))
    lowered = lower(program, outputs=case.outputs, tensorrt=rtx)
    case.check(lambda inputs: interpret(lowered, inputs))


def test_operators_of_prims_that_a_decomposition_makes_are_lowered(rtx: TensorRT) -> None:
    case = fn("xlogy", lambda x: torch.xlogy(x, 2), X)
    lowered = lower(lowerable(case.exported), outputs=case.outputs, tensorrt=rtx)
    case.check(lambda inputs: interpret(lowered, inputs))


@pytest.mark.parametrize(
    "case",
    [
        fn("kthvalue", lambda x: x.kthvalue(3, 2), Z),
        fn("median", lambda x: (*x.median(1), x.median()), Z),
        fn("median-nan", lambda x: torch.where(x > 1.8, float("nan"), x).median(2, True), Z),
        fn("cummax", lambda x: (*x.cummax(1), *x.cummin(-1)), Z),
        fn("logcumsumexp", lambda x: x.logcumsumexp(2), Z),
        fn(
            "block-diag",
            lambda x: (
                torch.block_diag(x[0, :, :2], x[0, 1:, 3:]) + torch.cat([x[0, :0, :], x[1]]).sum()
            ),
            Arg((2, 4, 8)),
        ),
    ],
    ids=lambda case: case.name,
)
def test_what_pytorch_does_not_decompose_is_lowered(rtx: TensorRT, case: Case) -> None:
    lowered = lower(lowerable(case.exported), outputs=case.outputs, tensorrt=rtx)
    case.check(lambda inputs: interpret(lowered, inputs))


@pytest.mark.parametrize(
    "x",
    [
        torch.tensor([2.0, math.nan, 3.0, math.nan, 1.0]),
        torch.tensor([3, 2, -(2**31), 2, 7], dtype=torch.int32),
        torch.tensor([3, 0, 5, 0, 7], dtype=torch.uint8),
    ],
    ids=["nan", "int32", "uint8"],
)
@pytest.mark.parametrize("target", [aten.cummax.default, aten.cummin.default])
def test_running_extremes_of_any_numbers_are_those_of_pytorch(
    target: torch._ops.OpOverload, x: Tensor
) -> None:
    for actual, expected in zip(OWN[target](x, 0), target(x, 0), strict=True):
        torch.testing.assert_close(actual, expected, equal_nan=True)


def test_a_graph_may_be_deeper_than_the_stack_of_python() -> None:
    graph = torch.fx.Graph()
    x = first = graph.placeholder("x")
    for _ in range(sys.getrecursionlimit()):
        x = graph.call_function(aten.add.Scalar, (x, 1))
    assert ConstantValues({}).value(x) is None
    assert ConstantValues({first: torch.zeros(1)}).value(x) == sys.getrecursionlimit()


def test_what_has_a_converter_stays_whole() -> None:
    case = fn("whole", lambda x, part: nn.functional.silu(part(x)), X, part=nn.Linear(8, 4))
    before = [node.target for node in case.exported.graph.nodes]
    assert [node.target for node in lowerable(case.exported).graph.nodes] == before


def quantile(x: Tensor) -> Tensor:
    """Gemma 3n's cutoff, of a constant share."""
    multiplier = torch.distributions.normal.Normal(0, 1).icdf(torch.tensor(0.95))
    return nn.functional.relu(x - x.mean(-1, keepdim=True) * multiplier)


def special(x: Tensor) -> Tensor:
    factors: Tensor = torch.special.i1(torch.arange(8.0) / 4)
    return x * factors


CONSTANT = [fn("quantile", quantile, X), fn("special", special, X)]


@pytest.mark.parametrize("case", CONSTANT, ids=lambda case: case.name)
@pytest.mark.filterwarnings("ignore")
def test_what_depends_on_no_input_and_has_no_converter_is_computed(
    rtx: TensorRT, case: Case
) -> None:
    lowered = lower(lowerable(case.exported), outputs=case.outputs, tensorrt=rtx)
    case.check(lambda inputs: interpret(lowered, inputs))


@pytest.mark.parametrize(
    "function",
    [
        torch.special.i1,
        lambda x: x * torch.special.i1(x.new_zeros(8) + x),
        lambda x: x + torch.rand(8),
    ],
    ids=["input", "part of an input", "random"],
)
def test_what_depends_on_an_input_or_is_random_is_no_constant(
    rtx: TensorRT, function: Callable[[Tensor], Tensor]
) -> None:
    case = fn("varies", function, X)
    with pytest.raises(BuildError, match=r"special_i1|aten\.rand"):
        lower(lowerable(case.exported), outputs=case.outputs, tensorrt=rtx)


def test_a_write_that_cannot_be_a_value_is_refused_with_its_line() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.count.add_(1)  # type: ignore[operator]
            return x + self.count  # type: ignore[operator]

    exported = torch.export.export(Counts(), (torch.zeros(3),))
    with pytest.raises(
        BuildError, match=r"add_.* writes b_count, a buffer of the model.* at .*test_lowerable.py"
    ):
        lowerable(exported)


class Several(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        values = torch.linalg.eigvalsh(x)
        drawn = torch.bernoulli(x)
        return torch.dropout(values * drawn, 0.5, True)


def test_all_operators_that_are_missing_are_named_with_their_lines(rtx: TensorRT) -> None:
    program = lowerable(torch.export.export(Several(), (torch.eye(3),)))
    with pytest.raises(BuildError) as error:
        lower(program, outputs=["out"], tensorrt=rtx)
    message = str(error.value)
    assert message.startswith("3 uses of operators cannot be lowered:\n")
    for text in ("linalg_eigh", "bernoulli", "drops elements at random"):
        (line,) = [line for line in message.splitlines() if text in line]
        assert "test_lowerable.py" in line


@pytest.mark.parametrize(
    "function",
    [torch.bernoulli, torch.randn_like, lambda x: aten.native_dropout.default(x, 0.5, True)[0]],
)
def test_what_is_known_to_be_unsupported_is_refused_under_its_own_name(
    rtx: TensorRT, function: Callable[[Tensor], Tensor]
) -> None:
    case = fn("unsupported", function, Arg((4, 4), low=0.0, high=1.0))
    (target,) = (
        node.target
        for node in case.exported.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
    )
    with pytest.raises(BuildError, match=f"operator {target} has no converter .*random numbers"):
        lower(lowerable(case.exported), outputs=case.outputs, tensorrt=rtx)
