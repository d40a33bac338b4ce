"""Generations over a TensorRT engine: steps are launched before the last tokens are read."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from inplace.drivers import StreamDriver, TokenizerConfig
from inplace.runtime.instance import ModelInstance
from inplace_builder.served.decoder import build_decoder
from inplace_builder.served.model_config import MODEL_VERSION
from inplace_builder.served.options import BuildOptions
from support.models import greedy, late_token, tiny_llama
from support.streaming import StreamClient
from transformers import LlamaForCausalLM

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use; there is none here"
)
pytest.importorskip("tensorrt", reason="needs TensorRT; it is not installed")

SLOTS, IDS = 4, [5]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LlamaForCausalLM:
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def engine(model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, path = (
        tmp_path_factory.mktemp("source"),
        tmp_path_factory.mktemp("repository") / "llama",
    )
    model.save_pretrained(source)
    build_decoder(
        source,
        path,
        BuildOptions(
            device="cuda",
            engine="tensorrt",
            capacity=64,
            chunk=8,
            slots=SLOTS,
            max_rows=SLOTS,
            serve="stream",
        ),
    )
    return path / MODEL_VERSION


@pytest.fixture
def instance(engine: Path) -> ModelInstance:
    instance = ModelInstance.open(engine)
    for tensor in instance.arena.tensors.values():
        tensor.fill_(float("nan"))
    torch.cuda.synchronize()
    return instance


@pytest.fixture
def followed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each step that was launched ahead."""
    result: list[int] = []
    follow = ModelInstance.launch_next

    def counted(self, flight, outputs):  # type: ignore[no-untyped-def]
        result.append(len(flight.batch.rows))
        return follow(self, flight, outputs)

    monkeypatch.setattr(ModelInstance, "launch_next", counted)
    return result


@pytest.fixture
def streams(instance: ModelInstance, model: LlamaForCausalLM) -> Iterator[StreamClient]:
    driver = StreamDriver(
        instance, TokenizerConfig(eos_token_ids=frozenset({late_token(greedy(model, IDS, 40))})), 64
    )
    yield StreamClient(driver)
    driver.close()


def test_many_generations_are_each_transformers_own(
    streams: StreamClient, model: LlamaForCausalLM, followed: list[int]
) -> None:
    prompts = [
        [(7 * seed + place) % 64 for place in range(1 + 5 * seed % 21)] for seed in range(4 * SLOTS)
    ]
    collected = [
        streams.generate(f"s{index}", ids, 12 + index % 9, end=True, ignore_eos=True)
        for index, ids in enumerate(prompts)
    ]
    for index, each in enumerate(collected):
        assert each.finish_reason == "length"
        assert each.tokens == greedy(model, prompts[index], 12 + index % 9)
    assert max(followed) == SLOTS
    assert streams.num_free_slots() == SLOTS


def test_what_follows_an_end_token_is_dropped_and_the_sequence_goes_on(
    streams: StreamClient, instance: ModelInstance, model: LlamaForCausalLM, followed: list[int]
) -> None:
    addresses = instance.arena.addresses()
    generated = greedy(model, IDS, 40)
    end = generated.index(late_token(generated))
    collected = streams.generate("a", IDS, 40)
    assert (collected.finish_reason, collected.tokens) == ("eos", generated[: end + 1])
    assert len(followed) >= end
    assert (
        streams.step("a", [3], position=len(IDS) + end + 1).next_token
        == greedy(model, [*IDS, *generated[: end + 1], 3], 1)[0]
    )
    slot = instance.table.find("a").slot
    for tensor in instance.arena.tensors.values():
        assert tensor[[other for other in range(SLOTS) if other != slot]].isnan().all()
    assert instance.arena.addresses() == addresses


def test_slots_of_ended_generations_are_others_at_once(
    streams: StreamClient, model: LlamaForCausalLM
) -> None:
    generated = greedy(model, IDS, 40)
    end = generated.index(late_token(generated))
    collected = [streams.generate(f"s{index}", IDS, 40, end=True) for index in range(10 * SLOTS)]
    assert all(
        (each.finish_reason, each.tokens) == ("eos", generated[: end + 1]) for each in collected
    )
    assert streams.num_free_slots() == SLOTS
