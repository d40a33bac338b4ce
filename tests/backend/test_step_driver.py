"""The step driver on real engines: order, waves, refusals, failures of the engine, idle slots."""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from conftest import CAPACITY, CHUNK, SLOTS, Repository, open_instance
from inplace.drivers.step import Answer, StepDriver
from inplace.engines import Engine
from inplace.errors import Code, RequestError
from inplace.instance import ModelInstance
from inplace.requests import Request
from inplace.sequences import SequenceId
from models import VOCABULARY
from torch import Tensor

Open = Callable[..., StepDriver]
BAD = [1, VOCABULARY]
"""Tokens that are refused with VALUE_RANGE."""


class Watched:
    """A real engine that keeps what each step was given, and fails once, after its work is done, when told to.

    Failing late is the worst case: memory has been written by then.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.slots: list[list[int]] = []
        self.counts: list[list[int]] = []
        self.fail_at = 0  # the step, counted from now, that fails; 0 is none

    def step(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.slots.append(inputs["slots"].tolist())
        if "row_offsets" in inputs:
            self.counts.append(inputs["row_offsets"].diff().tolist())
        outputs = self._engine.step(inputs)
        self.fail_at -= 1
        if self.fail_at == 0:
            raise RuntimeError("out of luck\nsecond line")
        return outputs


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small gain nothing from a second thread, and wait for it whenever the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def loaded() -> dict[tuple[Path, int | None, int], ModelInstance]:
    """Engines and arenas that earlier tests have opened; a test takes them with the memory poisoned and the table empty."""
    return {}


@pytest.fixture
def drive(loaded: dict[tuple[Path, int | None, int], ModelInstance]) -> Iterator[Open]:
    """Opens a model, its arena poisoned (a START must reset what needs it) and its engine `Watched`; closes every driver."""
    drivers: list[StepDriver] = []

    def opened(model: Path, slots: int | None = None, idle_timeout: float = 600.0) -> StepDriver:
        key = (model, slots, len(drivers))  # never one memory for two drivers of a test
        if key not in loaded:
            loaded[key] = open_instance(model, slots)
        plain = loaded[key]
        for tensor in plain.arena.tensors.values():
            tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)
        drivers.append(StepDriver(ModelInstance(plain.manifest, plain.arena, Watched(plain.engine), idle_timeout)))
        return drivers[-1]

    yield opened
    for driver in drivers:
        driver.close()


@pytest.fixture
def llama(repository: Repository, drive: Open) -> StepDriver:
    return drive(repository.path / "llama")


@pytest.fixture
def sums(repository: Repository, drive: Open) -> StepDriver:
    return drive(repository.path / "accumulator")


def watched(driver: StepDriver) -> Watched:
    assert isinstance(driver.instance.engine, Watched)
    return driver.instance.engine


def ask(sequence: SequenceId, ids: list[int], *, start: bool = False, end: bool = False, **parameters: bool | int | float | str) -> Request:
    return Request(sequence, start, end, {"input_ids": torch.tensor([ids])}, parameters=parameters)


def add(sequence: SequenceId, value: float, *, start: bool = False, end: bool = False) -> Request:
    return Request(sequence, start, end, {"value": torch.full((1, 4), value)})


def outputs(answer: Answer) -> dict[str, Tensor]:
    assert isinstance(answer, dict), answer
    return answer


def token(answer: Answer) -> int:
    return int(outputs(answer)["next_token"])


def total(answer: Answer) -> tuple[list[float], int]:
    found = outputs(answer)
    return found["sum"][0].tolist(), int(found["values"])


def refused(answer: Answer, code: Code, says: str = "", *, retryable: bool = False) -> None:
    assert isinstance(answer, RequestError), answer
    assert (answer.code, answer.retryable) == (code, retryable)
    assert says in str(answer)


def said(repository: Repository, ids: list[int]) -> int:
    """The next token by transformers itself."""
    with torch.no_grad():
        return int(repository.llama(torch.tensor([ids])).logits[0, -1].argmax())


def prompt(seed: int, tokens: int) -> list[int]:
    return torch.randint(0, VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


def memory(driver: StepDriver) -> dict[str, Tensor]:
    """Every bit of the arena."""
    return {name: tensor.clone().view(torch.uint8) for name, tensor in driver.instance.arena.tensors.items()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- order and waves ---


def test_end_start_start_of_one_id_in_one_call_take_effect_in_that_order(llama: StepDriver, repository: Repository) -> None:
    first, second, third = prompt(1, 5), prompt(2, 3), prompt(3, 4)
    llama.run([ask(1, first, start=True)])
    answers = llama.run([ask(1, [9], end=True), ask(1, second, start=True), ask(1, third, start=True)])
    assert [token(answer) for answer in answers] == [said(repository, ids) for ids in ([*first, 9], second, third)]
    assert len(llama.instance.table) == 1
    assert token(llama.run([ask(1, [7], position=4)])[0]) == said(repository, [*third, 7])


def test_steps_of_one_sequence_in_one_call_follow_each_other_and_answers_keep_the_order_asked(
    llama: StepDriver, repository: Repository
) -> None:
    one, two = prompt(1, 5), prompt(2, 3)
    answers = llama.run(
        [ask(1, one, start=True), ask(1, [3]), ask("1", two, start=True), ask(1, [4], end=True), ask("1", [5]), ask(1, [6])]
    )
    expected = [one, [*one, 3], two, [*one, 3, 4], [*two, 5]]
    assert [token(answer) for answer in answers[:5]] == [said(repository, ids) for ids in expected]
    refused(answers[5], Code.UNKNOWN_SEQUENCE, "no sequence 1 is live: it has not started, has ended")


def test_a_start_waits_for_the_slot_an_end_of_the_same_call_frees(repository: Repository, drive: Open) -> None:
    driver = drive(repository.path / "brief")
    ids = prompt(4, 6)
    driver.run([ask(1, [1], start=True), ask(2, [2], start=True)])
    slot = driver.instance.table.find(1).slot
    answers = driver.run([ask(2, [3]), ask(1, [4], end=True), ask(3, ids, start=True), ask(3, [5]), ask(4, [6], start=True)])
    assert [token(answer) for answer in answers[:4]] == [said(repository, seen) for seen in ([2, 3], [1, 4], ids, [*ids, 5])]
    refused(answers[4], Code.NO_FREE_SLOT, "all 2 slots are owned by live sequences", retryable=True)
    assert driver.instance.table.find(3).slot == slot
    assert watched(driver).slots[1] == [1 - slot, slot]  # the step that ended 1 did not yet know 3


def test_a_start_without_an_end_beside_it_is_refused_at_once(repository: Repository, drive: Open) -> None:
    driver = drive(repository.path / "brief")
    driver.run([ask(1, [1], start=True), ask(2, [2], start=True)])
    answers = driver.run([ask(1, [4]), ask(3, [5], start=True)])
    assert token(answers[0]) == said(repository, [1, 4])
    refused(answers[1], Code.NO_FREE_SLOT, "retry when one has ended", retryable=True)


def test_more_requests_than_rows_are_answered_in_several_steps(repository: Repository, drive: Open) -> None:
    driver = drive(repository.path / "llama", slots=20)
    prompts = [prompt(seed, 1 + seed % 7) for seed in range(20)]
    answers = driver.run([ask(1 + seed, ids, start=True) for seed, ids in enumerate(prompts)])
    assert [token(answer) for answer in answers] == [said(repository, ids) for ids in prompts]
    assert [len(slots) for slots in watched(driver).slots] == [SLOTS, SLOTS, 4]
    assert len({slot for slots in watched(driver).slots for slot in slots}) == 20


def test_a_prompt_longer_than_the_chunk_takes_several_steps_and_a_short_one_beside_it_only_the_first(
    llama: StepDriver, repository: Repository
) -> None:
    long, short = prompt(1, 2 * CHUNK + 3), prompt(2, 2)
    answers = llama.run([ask(1, long, start=True), ask(2, short, start=True)])
    assert [token(answer) for answer in answers] == [said(repository, long), said(repository, short)]
    assert watched(llama).counts == [[CHUNK, 2], [CHUNK], [3]]
    assert llama.instance.table.find(1).length == len(long)


def test_no_requests_are_no_step(llama: StepDriver) -> None:
    assert llama.run([]) == []
    assert watched(llama).slots == []


# --- refusals ---


def test_one_bad_request_among_good_ones_harms_nobody(repository: Repository, drive: Open) -> None:
    mixed, clean = drive(repository.path / "llama"), drive(repository.path / "llama")
    starts = [ask(seed, prompt(seed, 3 + seed), start=True) for seed in range(1, 5)]
    for driver in (mixed, clean):
        driver.run(starts)
    good = [ask(1, [5], logits=True), ask(2, prompt(9, 12), logits=True), ask(4, [6], end=True, logits=True)]
    bad = [ask(3, BAD), ask(99, [1]), ask(98, [1] * (CAPACITY + 1), start=True), Request(97, True, False, {})]
    answers = mixed.run([bad[0], good[0], bad[1], good[1], bad[2], good[2], bad[3]])
    alone = clean.run(good)
    refused(answers[0], Code.VALUE_RANGE, f"holds {VOCABULARY}")
    refused(answers[2], Code.UNKNOWN_SEQUENCE)
    refused(answers[4], Code.CAPACITY, f"{CAPACITY + 1} tokens do not fit")
    refused(answers[6], Code.MISSING_INPUT)
    for answer, expected in zip(answers[1::2], alone, strict=True):
        assert torch.equal(outputs(answer)["logits"], outputs(expected)["logits"])
        assert torch.isfinite(outputs(answer)["logits"]).all()
    assert same(memory(mixed), memory(clean))
    assert mixed.instance.table.find(3).length == clean.instance.table.find(3).length == 6


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (ask(1, BAD), Code.VALUE_RANGE),
        (ask(1, [-1]), Code.VALUE_RANGE),
        (ask(1, [1] * (CAPACITY - 4)), Code.CAPACITY),
        (Request(1, False, False, {"input_ids": torch.zeros(1, 0, dtype=torch.int64)}), Code.EMPTY_INPUT),
        (Request(1, False, False, {"input_ids": torch.zeros(1, 2)}), Code.BAD_DTYPE),
        (Request(1, False, False, {"input_ids": torch.zeros(2, 2, dtype=torch.int64)}), Code.BAD_SHAPE),
        (Request(1, False, False, {}), Code.MISSING_INPUT),
        (ask(1, [1], logits="perhaps"), Code.BAD_PARAMETER),
        (ask(1, [1], position=-1), Code.BAD_PARAMETER),
        (ask(1, [1], position=4), Code.POSITION),
        (ask(1, [1], position=6), Code.POSITION),
    ],
)
def test_a_refused_step_changes_nothing_and_a_good_one_goes_on(
    llama: StepDriver, repository: Repository, request_: Request, code: Code
) -> None:
    ids = prompt(1, 5)
    llama.run([ask(1, ids, start=True)])
    before, addresses, steps = memory(llama), llama.instance.arena.addresses(), len(watched(llama).slots)
    refused(llama.run([request_])[0], code)
    assert same(memory(llama), before)
    assert llama.instance.arena.addresses() == addresses
    assert len(watched(llama).slots) == steps
    assert not llama.instance.table.find(1).busy
    assert token(llama.run([ask(1, [7], position=5)])[0]) == said(repository, [*ids, 7])


def test_a_refused_start_leaves_no_slot(llama: StepDriver, repository: Repository) -> None:
    for attempt in range(2 * SLOTS):
        refused(llama.run([ask(100 + attempt, BAD, start=True)])[0], Code.VALUE_RANGE)
    assert llama.instance.table.free == SLOTS
    refused(llama.run([ask(100, [1])])[0], Code.UNKNOWN_SEQUENCE, "its START was refused")
    assert token(llama.run([ask(100, [1], start=True)])[0]) == said(repository, [1])


def test_a_refused_start_on_a_live_id_ends_it(llama: StepDriver, repository: Repository) -> None:
    llama.run([ask(1, prompt(1, 5), start=True)])
    refused(llama.run([ask(1, BAD, start=True)])[0], Code.VALUE_RANGE)
    assert llama.instance.table.free == SLOTS
    refused(llama.run([ask(1, [1])])[0], Code.UNKNOWN_SEQUENCE)
    assert token(llama.run([ask(1, [1], start=True)])[0]) == said(repository, [1])


def test_a_start_on_a_live_id_resets_it_without_a_second_slot(sums: StepDriver) -> None:
    sums.run([add(1, 5.0, start=True), add(2, 1.0, start=True)])
    assert total(sums.run([add(1, 2.0, start=True)])[0]) == ([2.0] * 4, 1)
    assert (len(sums.instance.table), sums.instance.table.free) == (2, 2)
    assert total(sums.run([add(2, 1.0)])[0]) == ([2.0] * 4, 2)


def test_a_refused_end_frees(repository: Repository, drive: Open) -> None:
    driver = drive(repository.path / "brief")
    for attempt in range(5):
        assert token(driver.run([ask(1 + attempt, [3], start=True)])[0]) == said(repository, [3])
        refused(driver.run([ask(1 + attempt, BAD, end=True)])[0], Code.VALUE_RANGE)
        assert driver.instance.table.free == 2
    driver.run([ask(1, [1], start=True), ask(2, [2], start=True)])
    answers = driver.run([ask(1, BAD, end=True), ask(3, [4], start=True)])
    refused(answers[0], Code.VALUE_RANGE)
    assert token(answers[1]) == said(repository, [4])  # in the slot that the refused END freed


def test_a_refused_start_with_end_leaves_no_slot(llama: StepDriver) -> None:
    refused(llama.run([ask(1, BAD, start=True, end=True)])[0], Code.VALUE_RANGE)
    assert token(llama.run([ask(1, [1], start=True, end=True)])[0]) >= 0
    assert llama.instance.table.free == SLOTS


@pytest.mark.parametrize("sequence", [0, ""])
def test_a_request_without_an_id_is_refused(llama: StepDriver, sequence: SequenceId) -> None:
    refused(llama.run([ask(sequence, [1], start=True)])[0], Code.NO_SEQUENCE_ID, "send a correlation id that is not 0 or empty")
    assert llama.instance.table.free == SLOTS


def test_a_position_must_be_the_cached_length(llama: StepDriver, repository: Repository) -> None:
    refused(llama.run([ask(1, [1, 2], start=True, position=1)])[0], Code.POSITION, "meant for position 1, the sequence holds 0")
    assert token(llama.run([ask(1, [1, 2], start=True, position=0)])[0]) == said(repository, [1, 2])
    assert token(llama.run([ask(1, [3], position=2)])[0]) == said(repository, [1, 2, 3])
    refused(llama.run([ask(1, [3], position=2)])[0], Code.POSITION, "meant for position 2, the sequence holds 3")
    assert token(llama.run([ask(1, [4], position="3")])[0]) == said(repository, [1, 2, 3, 4])


def test_exactly_the_capacity_fits_and_not_one_more(llama: StepDriver, repository: Repository) -> None:
    ids = prompt(1, CAPACITY)
    assert token(llama.run([ask(1, ids[:-1], start=True)])[0]) == said(repository, ids[:-1])
    refused(llama.run([ask(1, [1, 2])])[0], Code.CAPACITY, f"2 tokens do not fit: the sequence holds {CAPACITY - 1} of {CAPACITY}")
    assert token(llama.run([ask(1, ids[-1:])])[0]) == said(repository, ids)
    refused(llama.run([ask(1, [1])])[0], Code.CAPACITY, "0 are left")


def test_outputs_on_request_come_only_then(llama: StepDriver) -> None:
    assert set(outputs(llama.run([ask(1, [1], start=True)])[0])) == {"next_token"}
    both = outputs(llama.run([ask(1, [2], logits="true")])[0])
    assert set(both) == {"next_token", "logits"}
    assert both["logits"].shape == (1, VOCABULARY)
    assert int(both["logits"].argmax()) == int(both["next_token"])


# --- the engine fails ---


@pytest.mark.parametrize("fail_at", [1, 2])  # in the first and in the second chunk of the long prompt
def test_where_states_only_append_a_failed_step_is_retryable_and_unchanged(
    llama: StepDriver, repository: Repository, fail_at: int, caplog: pytest.LogCaptureFixture
) -> None:
    ids, more = prompt(1, 5), prompt(2, CHUNK + 2)
    llama.run([ask(1, ids, start=True), ask(2, ids, start=True), ask(3, ids, start=True)])
    slot = llama.instance.table.find(3).slot
    idle = {name: bits[slot].clone() for name, bits in memory(llama).items()}
    watched(llama).fail_at = fail_at
    answers = llama.run([ask(1, more), ask(2, [9])])
    says = "the engine failed (RuntimeError: out of luck); nothing was changed, send it again"
    refused(answers[0], Code.ENGINE_FAILED, says, retryable=True)
    if fail_at == 1:
        refused(answers[1], Code.ENGINE_FAILED, says, retryable=True)
    else:
        assert token(answers[1]) == said(repository, [*ids, 9])
    assert [llama.instance.table.find(number).length for number in (1, 2, 3)] == [5, 4 + fail_at, 5]
    assert all(torch.equal(bits[slot], idle[name]) for name, bits in memory(llama).items())
    assert "out of luck" in caplog.text
    assert token(llama.run([ask(1, more, position=5)])[0]) == said(repository, [*ids, *more])


def test_where_states_are_rewritten_a_failed_step_ends_its_sequences_and_no_others(sums: StepDriver) -> None:
    sums.run([add(1, 1.0, start=True), add(2, 2.0, start=True), add(3, 3.0, start=True)])
    watched(sums).fail_at = 1
    for answer in sums.run([add(1, 1.0), add(2, 2.0, end=True)]):
        refused(answer, Code.ENGINE_FAILED, "the engine failed (RuntimeError: out of luck); the sequence has ended, START it again")
    assert (len(sums.instance.table), sums.instance.table.free) == (1, 3)
    refused(sums.run([add(1, 1.0)])[0], Code.UNKNOWN_SEQUENCE)
    assert total(sums.run([add(3, 3.0)])[0]) == ([6.0] * 4, 2)
    assert [total(answer) for answer in sums.run([add(1, 7.0, start=True), add(2, 8.0, start=True)])] == [([7.0] * 4, 1), ([8.0] * 4, 1)]


def test_rows_of_the_next_step_are_not_touched_by_a_failed_one(repository: Repository, drive: Open) -> None:
    driver = drive(repository.path / "accumulator", slots=6)  # 4 rows a step
    watched(driver).fail_at = 1
    answers = driver.run([add(1 + n, float(n), start=True) for n in range(6)])
    for answer in answers[:4]:
        refused(answer, Code.ENGINE_FAILED, "no slot is held, START again", retryable=True)
    assert [total(answer) for answer in answers[4:]] == [([4.0] * 4, 1), ([5.0] * 4, 1)]


def test_a_failed_end_has_ended_and_says_so(llama: StepDriver) -> None:
    """Triton has ended the sequence whatever the answer is, so sending it again could not reach it."""
    llama.run([ask(1, [1, 2], start=True)])
    watched(llama).fail_at = 1
    refused(llama.run([ask(1, [3], end=True)])[0], Code.ENGINE_FAILED, "the sequence has ended, START it again", retryable=False)
    assert llama.instance.table.free == SLOTS


def test_a_start_before_the_end_that_frees_its_slot_waits_for_it(llama: StepDriver, repository: Repository) -> None:
    llama.run([ask(n + 1, [1], start=True) for n in range(SLOTS)])
    answers = llama.run([ask("late", [1, 2], start=True), ask(1, [3], end=True)])
    assert token(answers[0]) == said(repository, [1, 2])
    assert llama.instance.table.free == 0


def test_a_failed_start_leaves_no_slot(llama: StepDriver) -> None:
    watched(llama).fail_at = 1
    refused(llama.run([ask(1, [1, 2], start=True)])[0], Code.ENGINE_FAILED, retryable=True)
    assert llama.instance.table.free == SLOTS


def test_a_failed_start_can_be_sent_again(llama: StepDriver, repository: Repository) -> None:
    watched(llama).fail_at = 1
    refused(llama.run([ask(1, [1, 2], start=True)])[0], Code.ENGINE_FAILED, retryable=True)
    assert token(llama.run([ask(1, [1, 2], start=True)])[0]) == said(repository, [1, 2])
    assert llama.instance.table.free == SLOTS - 1


# --- idle slots ---


def test_the_drivers_own_thread_reclaims_an_idle_slot(repository: Repository, drive: Open, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="inplace")
    driver = drive(repository.path / "brief", idle_timeout=0.4)
    driver.run([ask("quiet", [1, 2, 3], start=True)])
    assert driver.instance.table.free == 1
    deadline = time.monotonic() + 10.0
    while driver.instance.table.free < 2:
        assert time.monotonic() < deadline, "the slot was never reclaimed"
        time.sleep(0.02)
    refused(driver.run([ask("quiet", [4])])[0], Code.UNKNOWN_SEQUENCE, "its slot was reclaimed (idle timeout 0.4 s)")
    driver.close()  # the thread logs after it has let go of the lock
    assert "sequence=quiet reclaimed slot=0 length=3: idle" in caplog.text
    assert token(driver.run([ask("quiet", [4], start=True)])[0]) == said(repository, [4])


def test_close_stops_the_thread_at_once(llama: StepDriver) -> None:
    thread = next(thread for thread in threading.enumerate() if thread is llama._reclaimer)
    assert thread.daemon
    begin = time.monotonic()
    llama.close()
    assert time.monotonic() - begin < 5.0  # its pause is 600 s
    assert not thread.is_alive()
