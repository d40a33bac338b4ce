"""A capacity that is chosen when an engine is loaded."""

from pathlib import Path

import pytest
import torch
from inplace.errors import LoadError, RequestError
from inplace.runtime.instance import ModelInstance
from inplace.runtime.requests import Request
from inplace.schema.served import Manifest
from inplace.schema.specs import Dtype
from inplace.trt import load_tensorrt
from inplace_builder import capture_decoder, load_decoder
from inplace_builder.errors import BuildError
from inplace_builder.lower import choose_mechanisms
from inplace_builder.served.decoder import build_decoder, decoder_options
from inplace_builder.served.model_config import MODEL_VERSION
from inplace_builder.served.options import BuildOptions
from support.models import greedy

pytestmark = pytest.mark.slow

OPTIONS = BuildOptions(capacity=64, min_capacity=16, chunk=8, slots=4, max_rows=2)
PROMPT = [5, 6, 7, 8, 9]


@pytest.fixture(scope="module")
def engine(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("repository") / "llama"
    build_decoder(llama_folder, path, OPTIONS)
    return path / MODEL_VERSION


def opened(folder: Path, capacity: int) -> ModelInstance:
    return ModelInstance.open(folder, Manifest.load(folder).at_capacity(capacity))


@pytest.mark.parametrize("capacity", [16, 23, 64])
def test_every_capacity_of_the_range_says_the_same_and_takes_its_own_memory(
    engine: Path, llama_folder: Path, capacity: int
) -> None:
    model, _ = load_decoder(llama_folder, Dtype.FLOAT32)
    instance = opened(engine, capacity)
    assert all(tensor.shape[2] == capacity for tensor in instance.arena.tensors.values())
    assert instance.arena.bytes == sum(
        4 * 4 * tensor[0].numel() for tensor in instance.arena.tensors.values()
    )
    generated: list[int] = []
    while len(PROMPT) + len(generated) <= capacity and len(generated) < 20:
        ids = generated[-1:] or PROMPT
        active = instance.admit(
            Request(1, not generated, False, {"input_ids": torch.tensor([ids])})
        )
        while not active.finished:
            instance.step([active])
        assert active.error is None
        generated.append(int(active.outputs["next_token"]))
        instance.finish(active)
    assert generated == greedy(model, PROMPT, len(generated))
    if len(PROMPT) + len(generated) > capacity:
        with pytest.raises(RequestError, match=f"of {capacity} positions"):
            instance.admit(Request(1, False, False, {"input_ids": torch.tensor([generated[-1:]])}))


@pytest.mark.parametrize("capacity", [15, 65])
def test_a_capacity_outside_the_range_is_refused(engine: Path, capacity: int) -> None:
    with pytest.raises(
        LoadError, match=f"the capacity {capacity} is outside the range .* 16 to 64"
    ):
        Manifest.load(engine).at_capacity(capacity)


def test_an_engine_of_one_capacity_has_no_choice(engine: Path) -> None:
    fixed = Manifest.load(engine).model_copy(update={"min_capacity": None})
    assert fixed.at_capacity(64) is fixed
    with pytest.raises(LoadError, match="build it with a range of capacities"):
        fixed.at_capacity(32)


def test_tensorrts_cache_layer_and_copies_refuse_it_with_a_reason(
    llama_folder: Path,
) -> None:
    model, _ = load_decoder(llama_folder, Dtype.FLOAT32)
    capture = capture_decoder(model, decoder_options(OPTIONS))
    graph, rtx = capture.exported.graph, load_tensorrt("tensorrt_rtx")
    with pytest.raises(
        BuildError,
        match="the capacity of key_states_0 is chosen at load; the layer has a static one",
    ):
        choose_mechanisms(graph, capture.states, rtx, order=("kv_cache_update",))
    with pytest.raises(
        BuildError,
        match=(
            "the capacity of key_states_0 is chosen at load; the scatter needs an extent that "
            "is known"
        ),
    ):
        choose_mechanisms(graph, capture.states, rtx, order=("copy",))


def test_a_range_that_cannot_be_is_refused() -> None:
    with pytest.raises(
        BuildError, match="min_capacity is 65; it must be from 1 to the capacity of 64"
    ):
        BuildOptions(capacity=64, min_capacity=65)
