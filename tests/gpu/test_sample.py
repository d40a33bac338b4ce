"""The sampling kernel on a GPU chooses the operator's tokens, with vocabularies of real size."""

import pytest
import torch
from inplace.kernels.sample import sample as launch
from inplace.kernels.sample import sample_workspace
from inplace.operators import sample

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
