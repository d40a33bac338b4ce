"""Prefix reuse on a real tritonserver: a chat that is sent whole in each turn, of two tenants."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from inplace_builder.tools.tritonserver import TritonServer
from support.models import greedy
from support.pool import Deployment, ServerPool
from support.served import MODEL, Served, Stream, ids_input
from support.streams import prompt
from tritonclient.grpc import model_config_pb2 as pb

pytestmark = pytest.mark.server

REUSING, OUTPUTS = "reusing", ("tokens", "finish_reason", "reused_tokens")


def turned_on(config: pb.ModelConfig) -> None:
    config.parameters["prefix_reuse"].string_value = "on"


@pytest.fixture(scope="module")
def reusing(stream_models: Path, pool: ServerPool) -> Iterator[TritonServer]:
    with pool.serve(Deployment(stream_models / MODEL, REUSING, turned_on)) as running:
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
