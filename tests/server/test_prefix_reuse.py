"""Prefix reuse on a real tritonserver: a chat that is sent whole in each turn, of two tenants."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from inplace_builder.tools.tritonserver import TritonServer
from support.faults import eventually
from support.models import greedy
from support.observed import by_instance
from support.pool import Deployment, ServerPool
from support.served import MODEL, Served, Stream, bytes_input, ids_input
from support.streams import prompt
from tritonclient.grpc import model_config_pb2 as pb

pytestmark = pytest.mark.server

REUSING, TWINS, OUTPUTS = "reusing", "reusing_twins", ("tokens", "finish_reason", "reused_tokens")


def turned_on(config: pb.ModelConfig) -> None:
    config.parameters["prefix_reuse"].string_value = "on"


def turned_on_twice(config: pb.ModelConfig) -> None:
    turned_on(config)
    config.instance_group[0].count = 2


@pytest.fixture(scope="module")
def reusing(stream_models: Path, pool: ServerPool) -> Iterator[TritonServer]:
    twins = Deployment(stream_models / MODEL, TWINS, turned_on_twice)
    with pool.serve(Deployment(stream_models / MODEL, REUSING, turned_on), twins) as running:
        yield running


def test_each_turn_of_a_chat_computes_what_is_new_and_tenants_share_nothing(
    served: Served, reusing: TritonServer
) -> None:
    history, reused = prompt(1, 20), {"alice": 0, "bob": 0}
    with Stream(served, REUSING) as stream:
        for turn in range(3):
            for tenant, before in reused.items():
                answer = stream.send(
                    [ids_input(history)], OUTPUTS, f"{tenant} {turn}", True, True,
                    {"max_tokens": 4, "ignore_eos": True, "sequence_key": tenant},
                )  # fmt: skip
                assert answer.error == ""
                assert answer.tokens == greedy(served.llama, history, 4)
                assert answer.step == [before]
            # The last token of an answer was not fed.
            reused = dict.fromkeys(reused, len(history) + 3)
            history = [*history, *answer.tokens, *prompt(2 + turn, 5)]
        step = stream.send(
            [ids_input(history)], ("reused_tokens",), "step", True, True, {"sequence_key": "alice"}
        )
        assert step.step == [reused["alice"]]
        answer = stream.ask("stranger", history, end=True, max_tokens=1)
        assert answer.tokens == greedy(served.llama, history, 1)


def test_a_prompt_goes_to_the_instance_that_has_its_beginning(
    served: Served, reusing: TritonServer
) -> None:
    """Triton sends every other one to the other instance."""
    forwarded = "inplace_requests_forwarded_total"
    before = by_instance(reusing, TWINS, forwarded)
    history, reused, turns = prompt(7, 20), 0, 6
    with Stream(served, TWINS) as stream:
        for turn in range(turns):
            answer = stream.send(
                [ids_input(history)], OUTPUTS, f"turn {turn}", True, True,
                {"max_tokens": 4, "ignore_eos": True, "sequence_key": "carol"},
            )  # fmt: skip
            assert answer.error == ""
            assert answer.tokens == greedy(served.llama, history, 4)
            assert answer.step == [reused]
            reused = len(history) + 3
            history = [*history, *answer.tokens, *prompt(2 + turn, 5)]
        for count in range(4):
            answer = stream.send(
                [bytes_input("text", ["Derivative Works of the Licensor " * 3])], OUTPUTS,
                f"text {count}", True, True,
                {"max_tokens": 1, "ignore_eos": True, "sequence_key": "dave"},
            )  # fmt: skip
            assert answer.error == ""
            assert (answer.step > [16]) is (count > 0)

    def passed_on() -> float:
        after = by_instance(reusing, TWINS, forwarded)
        return sum(after.values()) - sum(before.values())

    eventually(lambda: passed_on() >= 3, "requests were passed on")
