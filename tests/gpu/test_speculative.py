"""Speculative decoding with TensorRT: both programs as plans, steps of captured sizes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from inplace.drivers import StreamDriver, TokenizerConfig, engine_thread
from inplace.runtime.speculative import SpeculativeInstance
from inplace_builder.served.decoder import build_decoder
from inplace_builder.served.model_config import MODEL_VERSION
from inplace_builder.served.options import BuildOptions
from support.models import greedy, tiny_llama
from support.streaming import StreamClient
from transformers import LlamaForCausalLM

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use; there is none here"
)
pytest.importorskip("tensorrt", reason="needs TensorRT; it is not installed")

SLOTS, DRAFTED = 4, 3
PROMPTS = {"a": [5], "b": list(range(3, 22)), "c": [1, 2]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LlamaForCausalLM:
    return tiny_llama(tmp_path_factory.mktemp("model"), vocab_size=64)


@pytest.fixture(scope="module", params=["own", "other"])
def engine(
    request: pytest.FixtureRequest,
    model: LlamaForCausalLM,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    root: Path = tmp_path_factory.mktemp("engine")
    model.save_pretrained(root / "model")
    tiny_llama(root / "draft", vocab_size=64, num_hidden_layers=1)
    build_decoder(
        root / "model",
        root / "engine",
        BuildOptions(
            device="cuda",
            engine="tensorrt",
            capacity=64,
            chunk=8,
            slots=SLOTS,
            max_rows=SLOTS,
            serve="stream",
            draft=None if request.param == "own" else root / "draft",
            draft_layers=1 if request.param == "own" else None,
            draft_tokens=DRAFTED,
        ),
    )
    return root / "engine" / MODEL_VERSION


@pytest.fixture
def client(engine: Path) -> Iterator[StreamClient]:
    instance = SpeculativeInstance.open(engine)
    for tensor in instance.arena.tensors.values():
        tensor.fill_(float("nan"))
    torch.cuda.synchronize()
    driver = StreamDriver(instance, TokenizerConfig(), 8, engine_thread())
    yield StreamClient(driver)
    driver.close()


def test_interleaved_generations_have_transformers_own_tokens(
    client: StreamClient, model: LlamaForCausalLM
) -> None:
    channels = {name: client.generate(name, ids, 30) for name, ids in PROMPTS.items()}
    for name, ids in PROMPTS.items():
        assert channels[name].wait().tokens == greedy(model, ids, 30)


def test_a_seed_gives_the_same_tokens_alone_and_beside_others(client: StreamClient) -> None:
    sampling: dict[str, Any] = {"temperature": 0.9, "top_k": 20, "seed": 5}
    alone = client.generate("a", PROMPTS["c"], 30, end=True, **sampling).wait().tokens
    others = [client.generate(name, PROMPTS[name], 30) for name in ("b", "c")]
    assert client.generate("a", PROMPTS["c"], 30, **sampling).wait().tokens == alone
    for each in others:
        assert each.finish_reason == "length"
