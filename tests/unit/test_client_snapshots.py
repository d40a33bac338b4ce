"""What the client sends for a sequence that was lost where servers store sequences."""

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from inplace.client import AsyncClient, AsyncSequence, ClientError, SequenceLostError
from inplace.client.errors import parse_error
from inplace.client.generation_progress import GenerationProgress
from inplace.client.replay import RECENT_POSITIONS, SequenceTracker
from inplace.client.requests import (
    InferRequest,
    ModelMetadata,
    SequenceRequest,
    generation_request,
)
from inplace.errors import RESTORED, Code, restored_position
from inplace.protocol import INVALID_POSITION, POSITION
from tritonclient.utils import InferenceServerException

EVERY = 2
MODEL = ModelMetadata(
    decoupled=True,
    token_inputs=frozenset({"input_ids"}),
    has_text=True,
    step_outputs=("next_token",),
    stores=True,
    snapshot_every=EVERY,
)
SPEECH = ModelMetadata(
    decoupled=False, token_inputs=frozenset(), has_text=False, stores=True, snapshot_every=EVERY
)


def step(ids: Sequence[int], *, end: bool = False) -> SequenceRequest:
    return SequenceRequest({"input_ids": np.array(ids)}, end)


def chunk(value: float) -> SequenceRequest:
    return SequenceRequest({"features": np.full(2, value, np.float32)})


def run(tracker: SequenceTracker, request: SequenceRequest, model: ModelMetadata) -> None:
    """A request that is answered."""
    for sent in tracker.infer_requests(request, model):
        tracker.sending(sent, model)
    tracker.answered(request, model)


def shown(request: InferRequest) -> tuple[bool, object, object, list[float]]:
    """START, position, restore and the values of its input."""
    [values] = [array for name, array in request.inputs.items() if name != "stop"]
    parameters = request.parameters
    return request.start, parameters.get("position"), parameters.get("restore"), values.tolist()


def error(code: Code, message: str = "text") -> ClientError:
    text = f"INPLACE-{code} retryable=0 sequence=a request=r: {message}"
    return parse_error(InferenceServerException(text), "a", "r")


def gone() -> ClientError:
    return parse_error(InferenceServerException("x", "StatusCode.UNAVAILABLE"), "a", "r")


def lost(tracker: SequenceTracker, request: SequenceRequest, model: ModelMetadata) -> None:
    """The server does not answer, and the client moves to another one."""
    *_, sent = tracker.infer_requests(request, model)
    tracker.sending(sent, model)
    assert tracker.failed(gone(), sent).retryable
    tracker.replay_next(restore=True)


def response(tokens: list[int], **others: Any) -> dict[str, Any]:
    """A response of a generation."""
    return {"tokens": np.array(tokens), "finish_reason": np.array([b""]), **others}


@pytest.fixture
def tokens() -> SequenceTracker:
    tracker = SequenceTracker("a", "key", replay=True)
    run(tracker, step(range(6)), MODEL)
    run(tracker, step([6, 7]), MODEL)
    return tracker


@pytest.fixture
def speech() -> SequenceTracker:
    tracker = SequenceTracker("a", "key", replay=True)
    for value in range(20):
        run(tracker, chunk(value), SPEECH)
    return tracker


def test_a_restored_position_is_read_from_the_error() -> None:
    assert restored_position(f"INPLACE-POSITION …: {RESTORED}17, which is not") == 17
    assert restored_position("the sequence holds 17") is None
    assert restored_position(f"{RESTORED}many, which") is None


def test_what_a_snapshot_lacks_is_sent_again(tokens: SequenceTracker) -> None:
    request = step([8])
    lost(tokens, request, MODEL)
    [asked] = tokens.infer_requests(request, MODEL)
    assert shown(asked) == (True, 8, True, [8])
    refused = tokens.failed(error(Code.POSITION, f"{RESTORED}5, which is not"), asked)
    assert refused.retryable
    [rest] = tokens.infer_requests(request, MODEL)
    assert shown(rest) == (False, 5, None, [5, 6, 7, 8])
    tokens.answered(request, MODEL)
    assert tokens.length == 9
    [after] = tokens.infer_requests(step([9]), MODEL)
    assert shown(after) == (False, 9, None, [9])


def test_a_snapshot_at_the_position_runs_the_request(tokens: SequenceTracker) -> None:
    request = step([8])
    lost(tokens, request, MODEL)
    [asked] = tokens.infer_requests(request, MODEL)
    tokens.sending(asked, MODEL)
    tokens.answered(request, MODEL)
    assert tokens.length == 9
    [after] = tokens.infer_requests(step([9]), MODEL)
    assert shown(after) == (False, 9, None, [9])


@pytest.mark.parametrize("code", [Code.NO_SNAPSHOT, Code.BAD_SNAPSHOT, Code.BAD_PARAMETER])
def test_without_a_snapshot_everything_is_sent_again(tokens: SequenceTracker, code: Code) -> None:
    request = step([8])
    lost(tokens, request, MODEL)
    [asked] = tokens.infer_requests(request, MODEL)
    assert tokens.failed(error(code), asked).retryable
    [whole] = tokens.infer_requests(request, MODEL)
    assert shown(whole) == (True, 0, None, [*range(9)])
    tokens.answered(request, MODEL)
    assert tokens.length == 9


def test_a_busy_store_is_asked_again(tokens: SequenceTracker) -> None:
    request = step([8])
    lost(tokens, request, MODEL)
    [asked] = tokens.infer_requests(request, MODEL)
    text = "INPLACE-SNAPSHOT_BUSY retryable=1 sequence=a request=r: claimed"
    busy = parse_error(InferenceServerException(text), "a", "r")
    assert tokens.failed(busy, asked).retryable
    [again] = tokens.infer_requests(request, MODEL)
    assert shown(again) == shown(asked)


def test_a_sequence_that_was_fenced_follows_its_snapshot(tokens: SequenceTracker) -> None:
    [sent] = tokens.infer_requests(step([8]), MODEL)
    tokens.sending(sent, MODEL)
    assert tokens.failed(error(Code.FENCED), sent).retryable
    [asked] = tokens.infer_requests(step([8]), MODEL)
    assert shown(asked) == (True, 8, True, [8])


def test_requests_that_are_no_tokens_are_kept_as_long_as_a_snapshot_may_lack_them(
    speech: SequenceTracker,
) -> None:
    lost(speech, chunk(20), SPEECH)
    [asked] = speech.infer_requests(chunk(20), SPEECH)
    assert shown(asked) == (True, 20, True, [20, 20])
    speech.failed(error(Code.POSITION, f"{RESTORED}17, which"), asked)
    sent = speech.infer_requests(chunk(20), SPEECH)
    assert [shown(each) for each in sent] == [
        (False, position, None, [position, position]) for position in range(17, 21)
    ]
    assert len(speech._recent) == 2 * EVERY + RECENT_POSITIONS + 1
    speech.answered(chunk(20), SPEECH)
    assert speech.length == 21


def test_a_sequence_that_nobody_has_stored_is_lost(speech: SequenceTracker) -> None:
    lost(speech, chunk(20), SPEECH)
    [asked] = speech.infer_requests(chunk(20), SPEECH)
    refused = speech.failed(error(Code.NO_SNAPSHOT), asked)
    assert isinstance(refused, SequenceLostError)
    assert "no server has stored it" in str(refused)


def test_what_is_missing_behind_an_end_begins_with_a_start(speech: SequenceTracker) -> None:
    """Triton ends a sequence for the END of a request, also where the backend refuses it."""
    last = SequenceRequest(chunk(20).inputs, end=True)
    lost(speech, last, SPEECH)
    [asked] = speech.infer_requests(last, SPEECH)
    speech.failed(error(Code.POSITION, f"{RESTORED}18, which"), asked)
    first, *_ = speech.infer_requests(last, SPEECH)
    assert shown(first) == (False, 18, None, [18, 18])
    forgotten = InferenceServerException("x must specify the START flag on the first request")
    assert speech.failed(parse_error(forgotten, "a", "r"), first).retryable
    sent = speech.infer_requests(last, SPEECH)
    assert [shown(each) for each in sent] == [
        (position == 18, position, None, [position, position]) for position in range(18, 21)
    ]
    assert [each.end for each in sent] == [False, False, True]


def test_a_sequence_too_young_to_be_stored_is_sent_again_from_its_beginning() -> None:
    young = SequenceTracker("a", "key", replay=True)
    for value in range(3):
        run(young, chunk(value), SPEECH)
    lost(young, chunk(3), SPEECH)
    for _ in range(2):  # the second server is lost too, while it is sent
        [asked] = young.infer_requests(chunk(3), SPEECH)
        assert shown(asked) == (True, 3, True, [3, 3])
        refused = young.failed(error(Code.NO_SNAPSHOT), asked)
        assert refused.retryable
        sent = young.infer_requests(chunk(3), SPEECH)
        assert [shown(each) for each in sent] == [
            (value == 0, value, None, [value, value]) for value in range(4)
        ]
        young.failed(gone(), sent[1])
        young.replay_next(restore=True)
    [asked] = young.infer_requests(chunk(3), SPEECH)
    young.failed(error(Code.NO_SNAPSHOT), asked)
    full = error(Code.NO_FREE_SLOT)
    full.retryable = True
    young.failed(full, young.infer_requests(chunk(3), SPEECH)[0])
    assert len(young.infer_requests(chunk(3), SPEECH)) == 4
    young.answered(chunk(3), SPEECH)
    assert young.length == 4
    assert [shown(each) for each in young.infer_requests(chunk(4), SPEECH)] == [
        (False, 4, None, [4, 4])
    ]


def test_a_snapshot_that_is_older_than_what_was_kept_is_of_no_use(
    speech: SequenceTracker,
) -> None:
    lost(speech, chunk(20), SPEECH)
    [asked] = speech.infer_requests(chunk(20), SPEECH)
    speech.failed(error(Code.POSITION, f"{RESTORED}1, which"), asked)
    with pytest.raises(SequenceLostError, match="at position 1"):
        speech.infer_requests(chunk(20), SPEECH)


def test_a_generation_goes_on_behind_what_was_received(tokens: SequenceTracker) -> None:
    progress = GenerationProgress(
        generation_request([8, 9], 5, (), False, False, "r", {"seed": 3, "min_tokens": 4})
    )
    prefix, request = progress.begin()
    [sent] = tokens.infer_requests(request, MODEL, prefix, progress.num_fed)
    tokens.sending(sent, MODEL)
    progress.add_response(response([20, 21]))
    assert tokens.failed(gone(), sent, partial=True).retryable
    assert tokens.restores
    prefix, request = progress.begin(restores=True)
    [asked] = tokens.infer_requests(request, MODEL, prefix, progress.num_fed)
    assert shown(asked) == (True, 12, True, [])
    assert asked.parameters["max_tokens"] == 3
    assert asked.parameters["min_tokens"] == 2
    assert asked.parameters["seed"] == 3
    tokens.failed(error(Code.POSITION, f"{RESTORED}7, which"), asked)
    prefix, request = progress.begin(restores=tokens.restores)
    [rest] = tokens.infer_requests(request, MODEL, prefix, progress.num_fed)
    assert shown(rest) == (False, 7, None, [7, 8, 9, 20, 21])
    progress.add_response(
        {"tokens": np.array([22, 23, 24]), "finish_reason": np.array([b"length"])}
    )
    assert progress.tokens == [20, 21, 22, 23, 24]
    tokens.answered(progress.request, MODEL, progress.tokens)
    assert tokens.length == 15


def test_a_generation_with_stop_texts_begins_anew_where_its_prompt_did(
    tokens: SequenceTracker,
) -> None:
    progress = GenerationProgress(generation_request([8, 9], 5, ("x",), True, False, "r", {}))
    prefix, request = progress.begin()
    [sent] = tokens.infer_requests(request, MODEL, prefix, progress.num_fed)
    tokens.sending(sent, MODEL)
    progress.add_response(response([20], text_output=np.array([b"q"])))
    tokens.failed(gone(), sent, partial=True)
    prefix, request = progress.begin(restores=True)
    [asked] = tokens.infer_requests(request, MODEL, prefix, progress.num_fed)
    assert shown(asked) == (True, 8, True, [8, 9])
    assert asked.parameters["max_tokens"] == 5


def test_a_sequence_without_a_key_or_a_store_is_replayed() -> None:
    for key, model in (("", MODEL), ("key", ModelMetadata(True, MODEL.token_inputs, True))):
        tracker = SequenceTracker("a", key, replay=True)
        run(tracker, step([1, 2]), model)
        lost(tracker, step([3]), model)
        [sent] = tracker.infer_requests(step([3]), model)
        assert shown(sent) == (True, 0, None, [1, 2, 3])


def test_a_dead_instance_is_left_by_an_end_and_the_start_of_a_stranger(
    tokens: SequenceTracker,
) -> None:
    """Neither may end the sequence, which another instance may have."""
    died = parse_error(InferenceServerException("Stub process 'm_0_1' is not healthy."), "a", "r")
    assert died.process_died
    assert died.retryable
    assert not error(Code.SHUTDOWN).process_died
    tokens.failed(died, tokens.infer_requests(step([8]), MODEL)[0])
    end = tokens.release_request(MODEL)
    assert (end.sequence_id, end.start, end.end) == (tokens.sequence_id, False, True)
    assert end.parameters[POSITION] == INVALID_POSITION
    start, last = tokens.stranger_requests(MODEL)
    assert start.sequence_id == last.sequence_id != tokens.sequence_id
    assert [(each.start, each.end) for each in (start, last)] == [(True, False), (False, True)]
    assert start.route == last.route == end.route  # to the same server
    assert not start.parameters  # no key, no position
    assert len({each.request_id for each in (end, start, last)}) == 3


class Connection:
    """Answers all requests but the third START, and notes what was sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[int | str, bool, bool]] = []
        self.waits = asyncio.Event()

    async def infer(
        self, *, sequence_id: int | str, sequence_start: bool, sequence_end: bool, **_: object
    ) -> None:
        self.sent.append((sequence_id, sequence_start, sequence_end))
        if sequence_start and sum(start for _, start, _ in self.sent) == 3:
            self.waits.set()
            await asyncio.sleep(60)

    async def close(self) -> None:
        pass


def test_a_client_that_is_cancelled_frees_the_slots_that_strangers_took() -> None:
    async def run() -> list[tuple[int | str, bool, bool]]:
        connection: Any = Connection()
        async with AsyncClient("one:1", connect=lambda _: connection) as client:
            client._models["m"] = SPEECH
            sequence = AsyncSequence(client, "m")
            releasing = asyncio.create_task(sequence._release())
            await connection.waits.wait()
            releasing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await releasing
        return connection.sent  # type: ignore[no-any-return]

    sent = asyncio.run(run())
    started = {sequence for sequence, start, _ in sent if start}
    assert len(started) == 3
    assert started <= {sequence for sequence, _, end in sent if end}  # of the third one too
