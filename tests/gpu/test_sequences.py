"""Copies, prefixes and snapshots of sequences whose states are on a GPU.

Each engine runs steps on a stream of its own; threads of the store copy between host and device.
"""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from inplace.drivers import StepDriver, StreamDriver, TokenizerConfig
from inplace.errors import Code, RequestError
from inplace.runtime.instance import ModelInstance
from inplace.runtime.requests import Request
from inplace.runtime.schedules import ScheduledInstance
from inplace_builder import BuildOptions, capture_decoder, write_engine
from inplace_builder.capture.decoder import DecoderOptions
from inplace_builder.choices import Device, EngineKind
from inplace_builder.served.decoder import build_decoder
from support.copy_cases import CAPACITY as COPIED
from support.copy_cases import check_copies, random_arena
from support.copying import check_copy, check_prefix, poison
from support.decoding import SHAPE
from support.driving import random_tokens
from support.models import CHUNK, greedy, tiny_llama
from support.recurrent_models import recurrent_model
from support.storing import check_snapshot, left_in, memory_bucket, store_in, storing
from support.streaming import StreamClient, wait_until
from support.transducing import GreedySearch, chunks
from transducer import capture, modules
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

DEVICE: Device = "cuda"
pytestmark = [
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use; there is none here"
    ),
    pytest.mark.filterwarnings("ignore"),
]
ENGINES = pytest.mark.parametrize("engine", ["torch", "tensorrt"])
KEY: dict[str, Any] = {"sequence_key": "mine"}
RESTORE: dict[str, Any] = {"start": True, "restore": True, **KEY}
SAMPLED: dict[str, Any] = {"temperature": 0.9, "top_k": 40, "seed": 5}
PROMPT = random_tokens(3, CHUNK + 4)


def needs(engine: str) -> None:
    if engine == "tensorrt":
        pytest.importorskip("tensorrt", reason="needs TensorRT; it is not installed")


def options(engine: EngineKind, **more: Any) -> BuildOptions:
    return BuildOptions(device=DEVICE, engine=engine, slots=4, max_rows=4, chunk=CHUNK, **more)


def tiny_model(kind: str) -> PreTrainedModel:
    """A random decoder whose states are of a kind."""
    torch.manual_seed(0)
    if kind == "append":
        return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    if kind == "ring":
        return MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=16)).eval()
    return recurrent_model(kind)


@pytest.mark.parametrize("length", [0, 1, 17, COPIED, None])
def test_the_kernel_copies_the_bytes_that_pytorch_copies(length: int | None) -> None:
    check_copies(DEVICE, length)


def test_the_kernel_waits_for_no_stream() -> None:
    arena = random_arena(DEVICE, 1)
    arena.copy(0, 1, 3)  # compiles
    saved = arena.save_used(1, 3)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        arena.copy(0, 2, 3)
        again = arena.save_used(2, 3)
        arena.restore_used(1, saved, 3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name, tensor in again.items():
        assert torch.equal(tensor.view(torch.uint8), saved[name].view(torch.uint8)), name


@ENGINES
@pytest.mark.parametrize("kind", ["append", "ring", "lfm2", "mamba2"])
def test_copies_prefixes_and_snapshots_have_the_bits_of_sequences_that_ran_alone(
    tmp_path: Path, engine: EngineKind, kind: str
) -> None:
    needs(engine)
    captured = capture_decoder(tiny_model(kind), DecoderOptions(64, 4, CHUNK))
    write_engine(captured, tmp_path / "model", options(engine))
    instance = ModelInstance.open(tmp_path / "model" / "1")
    for length in (1, 23):
        check_copy(instance, 7, length)
        check_snapshot(instance, 7, length)
    if kind != "append":  # which may use a part of a kept slot
        check_prefix(instance, 7, 16)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LlamaForCausalLM:
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module", params=["torch", "tensorrt"])
def folder(
    request: pytest.FixtureRequest,
    model: LlamaForCausalLM,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    needs(request.param)
    source, path = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("models") / "llama"
    model.save_pretrained(source)
    build_decoder(source, path, options(request.param, capacity=96, serve="stream"))
    return path / "1"


@pytest.fixture
def servers(folder: Path) -> Iterator[list[StreamClient]]:
    """Two of one model that share a store, and store running sequences every 4 positions."""
    bucket, clients = memory_bucket(), list[StreamClient]()
    for _ in range(2):
        instance = ModelInstance.open(folder)
        poison(instance)
        store_in(instance, bucket, 4)
        clients.append(StreamClient(StreamDriver(instance, TokenizerConfig(), 64)))
    yield clients
    for client in clients:
        client.driver.close()
        assert client.driver.instance.snapshots is not None
        client.driver.instance.snapshots.close()
    assert left_in(bucket) == []


def test_a_running_generation_goes_on_in_another_server(servers: list[StreamClient]) -> None:
    first, second = servers
    expected = first.generate("whole", PROMPT, 60, end=True, **SAMPLED, **KEY).wait().tokens
    running = [
        first.generate(f"s{index}", PROMPT, 60, **SAMPLED, **KEY).wait_for_tokens(2)
        for index in range(3)
    ]
    first.driver.hand_over()
    for index, each in enumerate(running):
        got = each.wait().tokens
        if each.error is None:  # it was done before
            assert got == expected
        else:
            each.assert_refused(Code.SHUTDOWN, "was stored", retryable=True)
        rest = second.generate(
            f"s{index}", [], 60 - len(got) or 1, position=len(PROMPT) + len(got),
            end=True, **SAMPLED, **RESTORE
        ).wait().tokens  # fmt: skip
        assert (got + rest)[:60] == expected


def test_what_is_stored_while_steps_run_is_what_was_there(
    servers: list[StreamClient], model: LlamaForCausalLM
) -> None:
    first, second = servers
    expected = {index: greedy(model, PROMPT[index:], 50) for index in range(4)}
    running = [first.generate(f"s{index}", PROMPT[index:], 50, **KEY) for index in range(4)]
    for index, each in enumerate(running):
        assert each.wait().tokens == expected[index]
    keeper = first.driver.instance.snapshots
    assert keeper is not None
    for writer in keeper._writers:
        writer.submit(threading.get_ident).result()
    for index in range(4):
        prompt = PROMPT[index:]
        for got in (30, 50):  # a client that has lost answers, then one that has all
            position = len(prompt) + got
            rest = second.generate(
                f"s{index}", [], 50 - got or 1, position=position, **RESTORE
            ).wait()
            if rest.error is None:
                break
            assert got == 30
            rest.assert_refused(Code.POSITION)
        if got == 30:
            assert rest.tokens == expected[index][30:]
        second.end(f"s{index}", **KEY).wait()
    wait_until(lambda: not first.driver.instance.table.live or _fenced(first))


def _fenced(client: StreamClient) -> bool:
    """Whether the server has looked whether its sequences are others' now, and they are."""
    keeper = client.driver.instance.snapshots
    assert keeper is not None
    keeper._find_fenced()
    keeper._wake.set()
    return len(client.driver.instance.table) == 0


@ENGINES
def test_a_stream_of_audio_goes_on_in_another_server(engine: EngineKind, tmp_path: Path) -> None:
    needs(engine)
    parts = modules()
    write_engine(capture(*parts), tmp_path / "model", options(engine))
    bucket, drivers = memory_bucket(), list[StepDriver]()
    for _ in range(2):
        instance = ScheduledInstance.open(tmp_path / "model" / "1")
        store_in(instance, bucket)
        drivers.append(StepDriver(instance))
    streams = [chunks(stream, 12) for stream in range(3)]
    searches = [GreedySearch(*parts) for _ in streams]
    try:
        for place in range(12):
            moved = place % 3 == 0 and place > 0
            if moved:
                drivers[0].hand_over()
                drivers.reverse()
            parameters = {**KEY, **({"restore": True, "position": place} if moved else {})}
            requests = [
                Request(
                    number + 1, place == 0 or moved, place == 11,
                    {"features": stream[place][None]}, parameters=parameters,
                )
                for number, stream in enumerate(streams)
            ]  # fmt: skip
            for search, stream, answer in zip(
                searches, streams, drivers[0].run(requests), strict=True
            ):
                assert not isinstance(answer, RequestError), answer
                assert answer["tokens"][0].tolist() == search.feed(stream[place])
    finally:
        for driver in drivers:
            driver.close()
            assert driver.instance.snapshots is not None
            driver.instance.snapshots.close()
    assert left_in(bucket) == []


def test_without_memory_for_a_copy_a_sequence_lives_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured = capture_decoder(tiny_llama(tmp_path / "llama"), DecoderOptions(64, 4, CHUNK))
    write_engine(captured, tmp_path / "model", options("torch"))
    instance = ModelInstance.open(tmp_path / "model" / "1")
    with storing(instance, every=1):
        monkeypatch.setattr(instance.arena, "save_used", _allocate_too_much)
        driver = StepDriver(instance)
        try:
            for place in range(3):
                request = Request(
                    1, place == 0, False, {"input_ids": torch.tensor([[5]])}, parameters=KEY
                )
                [answer] = driver.run([request])
                assert not isinstance(answer, RequestError), answer
        finally:
            driver.close()
        results = instance.observer.metrics.snapshot()
        assert results["inplace_snapshots_total", "unavailable"] >= 1


def _allocate_too_much(slot: int, length: int | None) -> dict[str, torch.Tensor]:
    return {"states": torch.empty(1 << 50, dtype=torch.uint8, device=DEVICE)}
