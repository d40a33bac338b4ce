"""The sampling kernel on a GPU chooses the operator's tokens, with vocabularies of real size."""

import pytest
import torch
from inplace.kernels.memory import Pointer
from inplace.kernels.sample import sample as launch
from inplace.kernels.sample import sample_workspace
from inplace.operators import SampledTokens, sample, sample_with_options
from inplace.plugins import Launch, SampleOptionsOperation
from inplace.schema.specs import mask_words
from torch import Tensor

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use; there is none here"
)


@pytest.mark.parametrize(
    "make", [lambda x: x, lambda x: (x * 4).round() / 4], ids=["different", "ties"]
)
@pytest.mark.parametrize(
    ("rows", "count"), [(1, 49152), (8, 128256), (33, 49152), (6, 262144), (5, 77)]
)
def test_a_gpu_chooses_the_tokens_of_a_cpu(rows: int, count: int, make: object) -> None:
    torch.manual_seed(rows)
    assert callable(make)
    scores = make(torch.randn(rows, count) * 3)
    pick = torch.arange(rows) % 6
    temperature = torch.tensor([1.0, 0.0, 0.7, 1.3, 2.0, 0.1])[pick]
    top_k = torch.tensor([0, 0, 50, 0, 40, 1])[pick].int()
    top_p = torch.tensor([1.0, 1.0, 1.0, 0.8, 0.9, 1.0])[pick]
    parameters = [
        temperature,
        top_k,
        top_p,
        torch.randint(-(2**63), 2**63 - 1, (rows,)),
        torch.arange(rows).int(),
    ]
    expected = sample(scores, *parameters)
    on_gpu = [part.cuda() for part in (scores, *parameters)]
    names = ("scores", "temperature", "top_k", "top_p", "seeds", "positions")
    locks = torch.zeros(rows, dtype=torch.int32, device="cuda")
    workspace = torch.empty(sample_workspace(rows) // 4, device="cuda")
    for pdl in (False, True):
        out = torch.zeros(rows, 1, dtype=torch.int64, device="cuda")
        launch(
            **dict(zip(names, on_gpu, strict=True)),
            out=out,
            workspace=workspace,
            locks=locks,
            rows=rows,
            count=count,
            pdl=pdl,
        )
        assert torch.equal(out.cpu(), expected)
        assert not locks.any()
    assert torch.equal(sample(*on_gpu).cpu(), expected)


def arguments(rows: int, count: int, entries: int) -> list[Tensor]:
    """Rows without options, with each of them alone, and with several."""
    pick = torch.arange(rows) % 6
    tokens = torch.stack([torch.randperm(count)[:entries] for _ in range(rows)]).int()
    bias = torch.randn(rows, entries) * 3
    bias[:, 1:][torch.rand(rows, entries - 1) > 0.8] = float("-inf")
    return [
        torch.tensor([0.0, 1.0, 0.7, 1.3, 2.0, 0.0])[pick],
        torch.tensor([0, 0, 50, 0, 40, 1])[pick].int(),
        torch.tensor([1.0, 1.0, 1.0, 0.8, 0.9, 1.0])[pick],
        torch.randint(-(2**63), 2**63 - 1, (rows,)),
        torch.arange(rows).int(),
        torch.tensor([0.0, 0.3, 0.05, 0.0, 1.0, 0.5])[pick],
        torch.tensor([1, 0, 6, 21, 3, 0])[pick].int(),
        torch.tensor([0, entries, -1 - entries, 1, -1, -2])[pick].int(),
        tokens,
        torch.stack([bias, torch.rand(rows, entries) + 0.5, torch.rand(rows, entries)], 1),
        torch.randint(-(2**31), 2**31, (rows, mask_words(count))).int() | 1,
    ]


def assert_same(result: SampledTokens, expected: SampledTokens, num_logprobs: Tensor) -> None:
    """What rows have asked for is the same, bit for bit."""
    assert torch.equal(result.tokens.cpu(), expected.tokens)
    for row, number in enumerate(num_logprobs.tolist()):
        if number:
            count = number - 1
            assert torch.equal(result.token_logprobs[row].cpu(), expected.token_logprobs[row])
            for part, other in zip(result[2:], expected[2:], strict=True):
                assert torch.equal(part[row, :count].cpu(), other[row, :count])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("rows", "count", "entries"), [(1, 49152, 5), (12, 128256, 4096), (33, 49152, 300), (6, 77, 77)]
)
def test_options_give_the_results_of_a_cpu(rows: int, count: int, entries: int, tied: bool) -> None:
    torch.manual_seed(rows)
    scores = torch.randn(rows, count) * 3
    if tied:
        scores = (scores * 4).round() / 4
    options = arguments(rows, count, entries)
    expected = sample_with_options(scores, *options)
    on_gpu = [part.cuda() for part in (scores, *options)]
    assert_same(sample_with_options(*on_gpu), expected, options[6])
    plugin = SampleOptionsOperation(max_rows=rows)
    shapes = [tuple(part.shape) for part in on_gpu]
    dtypes = [part.dtype for part in on_gpu]
    locks = torch.zeros(plugin.locks(), dtype=torch.int32, device="cuda")
    workspace = torch.empty(plugin.workspace(shapes, dtypes), dtype=torch.uint8, device="cuda")
    for pdl in (False, True):
        out = SampledTokens(*(torch.zeros_like(part, device="cuda") for part in expected))
        plugin.launch(
            Launch(
                shapes,
                [Pointer(part.data_ptr(), part.dtype) for part in on_gpu],
                [Pointer(part.data_ptr(), part.dtype) for part in out],
                workspace.data_ptr(),
                Pointer(locks.data_ptr(), locks.dtype),
                pdl,
            )
        )
        assert_same(out, expected, options[6])
        assert not locks.any()
