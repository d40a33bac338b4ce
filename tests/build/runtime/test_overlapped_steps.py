"""Steps that are launched before the tokens of the last one are handled, as on a GPU."""

import pytest
import torch
from inplace.drivers import TokenizerConfig
from inplace.errors import Code
from inplace.runtime.requests import Request
from support.models import SLOTS, Repository, greedy, late_token
from support.streaming import ALL_OUTPUTS, OpenStreams, RecordingChannel, slow_steps, wait_until

pytestmark = pytest.mark.parametrize("streams", [True], indirect=True, ids=["overlaps"])

IDS, OTHER_IDS = [5], [9]


def test_no_step_is_launched_after_the_last_token_of_max_tokens(
    streams: OpenStreams, repository: Repository
) -> None:
    client = streams()
    assert client.generate("a", IDS, 12).wait().tokens == greedy(repository.llama, IDS, 12)
    assert len(client.engine.slots) == 12


def test_the_token_after_an_end_token_is_dropped_and_the_sequence_continues(
    streams: OpenStreams, repository: Repository
) -> None:
    expected = greedy(repository.llama, IDS, 40)
    end = expected.index(late_token(expected))
    client = streams(TokenizerConfig(eos_token_ids=frozenset({expected[end]})))
    channel = client.generate("a", IDS, 40)
    assert (channel.finish_reason, channel.tokens) == ("eos", expected[: end + 1])
    assert (
        client.step("a", [3], position=len(IDS) + end + 1).next_token
        == greedy(repository.llama, [*IDS, *expected[: end + 1], 3], 1)[0]
    )
    assert len(client.engine.slots) == end + 3, (
        "one step for each token, one that is dropped, and one for the last request"
    )


def test_a_failed_step_does_not_change_a_generation_that_had_finished_before_it(
    streams: OpenStreams, repository: Repository
) -> None:
    expected = greedy(repository.llama, IDS, 40)
    end = expected.index(late_token(expected))
    client = streams(TokenizerConfig(eos_token_ids=frozenset({expected[end]})))
    ended, failed = RecordingChannel(ALL_OUTPUTS), RecordingChannel(ALL_OUTPUTS)
    client.engine.fail_at = end + 2  # the step launched before the end token is known
    client.driver.submit(
        (
            Request(
                name,
                True,
                False,
                {"input_ids": torch.tensor([ids])},
                "r",
                {"max_tokens": 40, "ignore_eos": name == "b"},
            ),
            {},
            channel,
        )
        for name, ids, channel in (("a", IDS, ended), ("b", OTHER_IDS, failed))
    )
    assert (ended.finish_reason, ended.tokens) == ("eos", expected[: end + 1])
    failed.assert_refused(Code.ENGINE_FAILED, "out of luck", retryable=True)
    tokens = failed.tokens  # the error replaces tokens that had not been sent
    assert tokens == greedy(repository.llama, OTHER_IDS, end + 1)[: len(tokens)]
    assert (
        client.step("a", [3]).next_token
        == greedy(repository.llama, [*IDS, *expected[: end + 1], 3], 1)[0]
    )
    client.step("b", [3]).assert_refused(Code.UNKNOWN_SEQUENCE)
    assert client.num_free_slots() == SLOTS - 1


def test_slots_of_finished_generations_are_reused_at_once(
    streams: OpenStreams, repository: Repository
) -> None:
    expected = greedy(repository.llama, IDS, 40)
    end = expected.index(late_token(expected))
    client = streams(TokenizerConfig(eos_token_ids=frozenset({expected[end]})))
    channels = [client.generate(f"s{index}", IDS, 40, end=True) for index in range(5 * SLOTS)]
    assert all(
        (each.finish_reason, each.tokens) == ("eos", expected[: end + 1]) for each in channels
    )
    assert client.num_free_slots() == SLOTS


def test_a_driver_can_be_closed_while_an_overlapped_step_is_in_flight(
    streams: OpenStreams,
) -> None:
    client = streams()
    with slow_steps(client, 0.05):
        channels = [client.generate(name, IDS, 30, ignore_eos=True) for name in "abc"]
        wait_until(lambda: all(len(each.responses) > 2 for each in channels))
        client.driver.close()
    for each in channels:
        each.assert_refused(Code.SHUTDOWN, retryable=True)
    assert client.num_free_slots() == SLOTS
