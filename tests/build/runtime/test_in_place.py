"""A long decode writes only the rows that it appends, moves no state and needs no new memory."""

import gc
from pathlib import Path

import psutil
import pytest
import torch
from inplace.drivers.step_driver import StepDriver
from inplace.runtime.instance import ModelInstance
from inplace.runtime.requests import Request
from inplace_builder.served.decoder import build_decoder
from inplace_builder.served.options import BuildOptions
from support.long import long_except
from support.models import VOCABULARY, Repository, open_instance
from torch import Tensor

CAPACITY, SLOTS = 1024, 4
WARM = 100
"""Steps after which resident memory must stay where it is."""


@pytest.fixture(scope="module")
def long_llama(repository: Repository, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with room for a long decode."""
    path = tmp_path_factory.mktemp("deep") / "deep"
    build_decoder(
        repository.llama_folder,
        path,
        BuildOptions(slots=SLOTS, max_rows=SLOTS, capacity=CAPACITY, chunk=8),
    )
    return path


def poisoned(model: Path) -> ModelInstance:
    """An instance whose arena is full of NaN: steps must not read what they have not written."""
    instance = open_instance(model)
    for spec in instance.manifest.states:
        assert not spec.reset
        instance.arena.tensors[spec.name].fill_(float("nan"))
    return instance


def bits(tensor: Tensor) -> Tensor:
    """A view of the same memory in which NaN equals itself."""
    assert tensor.dtype == torch.float32
    return tensor.view(torch.int32)


def request(ids: list[int], *, start: bool = False) -> Request:
    return Request(1, start, False, {"input_ids": torch.tensor([ids])}, parameters={"logits": True})


@pytest.mark.parametrize("steps", long_except([200], [200, 1000]))
def test_every_step_writes_its_own_rows_and_no_other_bit(
    long_llama: Path, repository: Repository, steps: int
) -> None:
    """Values (the logits of transformers), identity (addresses), memory (bits, resident bytes)."""
    instance = poisoned(long_llama)
    driver = StepDriver(instance)
    process = psutil.Process()
    try:
        ids = [3, 141, 59]
        addresses = instance.arena.addresses()
        shadow = {name: bits(tensor).clone() for name, tensor in instance.arena.tensors.items()}
        resident = 0
        for step in range(steps):
            fed, start = (ids, 0) if step == 0 else (ids[-1:], len(ids) - 1)
            answer = driver.run([request(fed, start=step == 0)])[0]
            assert isinstance(answer, dict), answer
            slot = instance.table.find(1).slot
            for spec in instance.manifest.states:
                now = bits(instance.arena.tensors[spec.name])
                assert spec.axis is not None
                appended = now[slot].narrow(spec.axis, start, len(fed))
                before = shadow[spec.name][slot].narrow(spec.axis, start, len(fed))
                assert not torch.equal(appended, before)  # the step did write
                before.copy_(appended)
                assert torch.equal(now, shadow[spec.name]), (
                    f"step {step} wrote {spec.name} outside its rows"
                )
            if step in (0, WARM, steps - 1):
                assert torch.isfinite(answer["logits"]).all()
                with torch.no_grad():
                    expected = repository.llama(torch.tensor([ids])).logits[0, -1]
                torch.testing.assert_close(answer["logits"][0], expected, rtol=1e-3, atol=1e-3)
            if step == WARM:
                gc.collect()
                resident = process.memory_info().rss
            ids.append(int(answer["next_token"]))
        gc.collect()
        grown = process.memory_info().rss / resident - 1
        assert grown < 0.01, f"resident memory grew by {grown:.1%} in {steps - WARM} steps"
        assert instance.arena.addresses() == addresses
        assert instance.table.find(1).length == steps + 2
    finally:
        driver.close()


def test_rows_of_other_slots_are_neither_read_nor_written(long_llama: Path) -> None:
    """The same requests, beside NaN and beside three other sequences in the same steps."""
    alone, batched = poisoned(long_llama), poisoned(long_llama)
    drivers = StepDriver(alone), StepDriver(batched)
    generator = torch.Generator().manual_seed(0)
    try:
        for step in range(30):
            ids = torch.randint(0, VOCABULARY, (1 + step % 11,), generator=generator).tolist()
            answer = drivers[0].run([request(ids, start=step == 0)])[0]
            others = [
                Request(
                    n, step == 0, False, {"input_ids": torch.tensor([[n] * (1 + (step + n) % 5)])}
                )
                for n in (2, 3, 4)
            ]
            answers = drivers[1].run([request(ids, start=step == 0), *others])
            in_batch = answers[0]
            assert isinstance(answer, dict)
            assert isinstance(in_batch, dict)
            torch.testing.assert_close(in_batch["logits"], answer["logits"], rtol=1e-3, atol=1e-3)
        slot, length = alone.table.find(1).slot, alone.table.find(1).length
        for spec in alone.manifest.states:
            one, many = alone.arena.tensors[spec.name], batched.arena.tensors[spec.name]
            assert one.isnan().all(dim=(1, 2, 3)).tolist() == [
                other != slot for other in range(SLOTS)
            ]
            assert one[slot, :, length:].isnan().all()
            torch.testing.assert_close(
                many[batched.table.find(1).slot, :, :length],
                one[slot, :, :length],
                rtol=1e-3,
                atol=1e-3,
            )
    finally:
        for driver in drivers:
            driver.close()
