"""Sampling options on a real tritonserver: over gRPC, HTTP generate and with both clients."""

import asyncio
from typing import Any

import numpy as np
import pytest
from inplace.client import (
    AsyncClient,
    AsyncSequence,
    Client,
    GenerationOptions,
    RefusedError,
    Sequence,
    TokenLogprob,
)
from support.models import greedy
from support.served import MODEL, Served
from support.streams import prompt

pytestmark = pytest.mark.server

OPTIONS: GenerationOptions = {
    "temperature": 1.5,
    "seed": 3,
    "min_p": 0.01,
    "logprobs": 2,
    "repetition_penalty": 1.3,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.25,
    "logit_bias": {7: 2.0, 9: -4.5},
    "banned_token_ids": [3, 4],
    "min_tokens": 5,
}
HTTP: dict[str, Any] = {**OPTIONS, "logit_bias": "7:2,9:-4.5", "banned_token_ids": "3,4"}


def test_all_ways_to_generate_give_the_same_tokens_and_log_probabilities(served: Served) -> None:
    ids, url = prompt(8, 9), served.server.grpc_url
    with Client(url) as client, Sequence(client, MODEL) as sequence:
        generation = sequence.generate(ids, 12, **OPTIONS)
        pieces = list(generation)
    assert len(generation.tokens) >= 5
    assert [value for piece in pieces for value in piece.logprobs] == generation.logprobs
    assert [each.token for each in generation.logprobs] == generation.tokens
    assert all(len(each.top) == 2 for each in generation.logprobs)
    assert all(each.logprob <= each.top[0][1] for each in generation.logprobs)

    async def other() -> tuple[list[int], list[TokenLogprob]]:
        async with AsyncClient(url) as client, AsyncSequence(client, MODEL) as sequence:
            generation = sequence.generate(ids, 12, **OPTIONS)
            async for _ in generation:
                pass
            return generation.tokens, generation.logprobs

    assert asyncio.run(other()) == (generation.tokens, generation.logprobs)
    [event] = served.events(input_ids=ids, max_tokens=12, stream=False, **HTTP)
    assert event["tokens"] == generation.tokens
    assert np.allclose(event["token_logprobs"], [each.logprob for each in generation.logprobs])
    top = [token for each in generation.logprobs for token, _ in each.top]
    assert event["top_tokens"] == top
    assert len(event["top_logprobs"]) == len(top)


def test_a_step_returns_log_probabilities_if_it_asks_for_them(served: Served) -> None:
    ids = prompt(8, 9)
    with Client(served.server.grpc_url) as client, Sequence(client, MODEL) as sequence:
        outputs = sequence.step({"input_ids": np.array(ids)}, parameters={"logprobs": 3})
        assert outputs["top_tokens"].shape == outputs["top_logprobs"].shape == (1, 3)
        assert (
            outputs["top_tokens"][0, 0]
            == outputs["next_token"][0]
            == greedy(served.llama, ids, 1)[0]
        )
        assert outputs["token_logprobs"][0] == outputs["top_logprobs"][0, 0]
        plain = sequence.step({"input_ids": np.array([5])})
        assert set(plain) == {"next_token"}
        with pytest.raises(RefusedError, match="of a step need 'num_generated'"):
            sequence.step({"input_ids": np.array([5])}, parameters={"presence_penalty": 1.0})
