"""Steps that are launched before the driver has looked at what the last one said, as on a GPU."""

import pytest
import torch
from inplace.drivers import TokenizerConfig
from inplace.errors import Code
from inplace.runtime.requests import Request
from support.models import SLOTS, Repository, greedy, late_token
from support.streaming import OUTPUTS, Heard, OpenStreams, slowed, until

pytestmark = pytest.mark.parametrize("streams", [True], indirect=True, ids=["overlaps"])

IDS, OTHER = [5], [9]


def test_no_step_is_launched_for_a_generation_that_is_known_to_end(
    streams: OpenStreams, repository: Repository
) -> None:
    driver = streams()
    assert driver.generate("a", IDS, 12).wait().tokens == greedy(repository.llama, IDS, 12)
    assert len(driver.engine.slots) == 12


def test_the_token_behind_an_end_token_is_dropped_and_the_sequence_goes_on(
    streams: OpenStreams, repository: Repository
) -> None:
    said = greedy(repository.llama, IDS, 40)
    end = said.index(late_token(said))
    driver = streams(TokenizerConfig(eos_token_ids=frozenset({said[end]})))
    heard = driver.generate("a", IDS, 40)
    assert (heard.reason, heard.tokens) == ("eos", said[: end + 1])
    assert (
        driver.ask("a", [3], position=len(IDS) + end + 1).next_token
        == greedy(repository.llama, [*IDS, *said[: end + 1], 3], 1)[0]
    )
    assert len(driver.engine.slots) == end + 3, (
        "one step for each token, one that was dropped, and the last request's"
    )


def test_a_step_that_fails_is_nothing_to_a_generation_that_was_over_before_it(
    streams: OpenStreams, repository: Repository
) -> None:
    said = greedy(repository.llama, IDS, 40)
    end = said.index(late_token(said))
    driver = streams(TokenizerConfig(eos_token_ids=frozenset({said[end]})))
    ended, failed = Heard(OUTPUTS), Heard(OUTPUTS)
    driver.engine.fail_at = (
        end + 2
    )  # launched when the end token has been computed, and nobody knows yet
    driver.driver.submit(
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
            heard,
        )
        for name, ids, heard in (("a", IDS, ended), ("b", OTHER, failed))
    )
    assert (ended.reason, ended.tokens) == ("eos", said[: end + 1])
    failed.refused(Code.ENGINE_FAILED, "out of luck", retryable=True)
    heard = failed.tokens  # an error takes the place of what was not sent yet
    assert heard == greedy(repository.llama, OTHER, end + 1)[: len(heard)]
    assert (
        driver.ask("a", [3]).next_token
        == greedy(repository.llama, [*IDS, *said[: end + 1], 3], 1)[0]
    )
    driver.ask("b", [3]).refused(Code.UNKNOWN_SEQUENCE)
    assert driver.free() == SLOTS - 1


def test_slots_of_ended_generations_are_others_at_once(
    streams: OpenStreams, repository: Repository
) -> None:
    said = greedy(repository.llama, IDS, 40)
    end = said.index(late_token(said))
    driver = streams(TokenizerConfig(eos_token_ids=frozenset({said[end]})))
    heard = [driver.generate(f"s{index}", IDS, 40, end=True) for index in range(5 * SLOTS)]
    assert all((each.reason, each.tokens) == ("eos", said[: end + 1]) for each in heard)
    assert driver.free() == SLOTS


def test_a_driver_is_closed_while_a_step_that_was_launched_ahead_is_under_way(
    streams: OpenStreams,
) -> None:
    driver = streams()
    with slowed(driver, 0.05):
        heard = [driver.generate(name, IDS, 30, ignore_eos=True) for name in "abc"]
        until(lambda: all(len(each.responses) > 2 for each in heard))
        driver.driver.close()
    for each in heard:
        each.refused(Code.SHUTDOWN, retryable=True)
    assert driver.free() == SLOTS
