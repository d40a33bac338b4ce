"""The PyTorch engine on a GPU; its build compares it with the model."""

from pathlib import Path

import pytest
import torch
from inplace.runtime.instance import ModelInstance
from inplace.runtime.requests import Request
from inplace.schema.specs import Dtype
from inplace_builder.served.decoder import build_decoder
from inplace_builder.served.options import BuildOptions
from support.models import greedy, tiny_llama

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use; there is none here"
)


@pytest.mark.parametrize("dtype", [Dtype.FLOAT32, Dtype.FLOAT16, Dtype.BFLOAT16])
def test_a_decoder_builds_and_verifies_on_the_gpu(tmp_path: Path, dtype: Dtype) -> None:
    model = tiny_llama(tmp_path / "llama")
    build_decoder(
        tmp_path / "llama",
        tmp_path / "out",
        BuildOptions(dtype=dtype, device="cuda", capacity=64, chunk=8),
    )
    instance = ModelInstance.open(tmp_path / "out" / "1")
    arena = instance.arena
    addresses = arena.addresses()
    ids, tokens = torch.tensor([[5, 6, 7]]), []
    for step in range(16):
        active = instance.admit(Request(1, step == 0, False, {"input_ids": ids}))
        instance.step([active])
        instance.finish(active)
        ids = active.outputs["next_token"]
        tokens.append(int(ids))
    assert arena.addresses() == addresses
    if dtype is Dtype.FLOAT32:
        assert tokens == greedy(model, [5, 6, 7], 16)
