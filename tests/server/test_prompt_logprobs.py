"""Log-probabilities of prompts on a real tritonserver, with both clients."""

import asyncio

import numpy as np
import pytest
import torch
from inplace.client import (
    AsyncClient,
    AsyncSequence,
    Client,
    PromptLogprob,
    RefusedError,
    Sequence,
    decode_prompt_logprobs,
)
from support.served import CHUNK, MODEL, Served
from support.streams import prompt
from support.vocabulary import tiny_tokenizer

pytestmark = pytest.mark.server


def check(served: Served, answer: list[PromptLogprob], ids: list[int], top: int) -> None:
    with torch.no_grad():
        logprobs = served.llama(torch.tensor([ids])).logits[0].log_softmax(-1)
    first, *others = answer
    assert first == PromptLogprob(ids[0], None, None)
    assert [each.token for each in answer] == ids
    assert [each.logprob for each in others] == pytest.approx(
        logprobs[:-1].gather(1, torch.tensor(ids)[1:, None]).flatten().tolist(), abs=1e-4
    )
    expected = logprobs[:-1].topk(top)
    assert [[token for token, _ in each.top] for each in others] == expected.indices.tolist()
    for each in others:
        if each.rank is not None and each.rank <= top:
            assert each.top[each.rank - 1] == (each.token, each.logprob)


def test_generations_and_steps_answer_them_to_both_clients(served: Served) -> None:
    ids, url = prompt(8, 2 * CHUNK + 5), served.server.grpc_url
    with Client(url) as client, Sequence(client, MODEL) as sequence:
        generation = sequence.generate(ids, 4, prompt_logprobs=3)
        for _ in generation:
            pass
        check(served, generation.prompt_logprobs, ids, 3)

    async def other() -> tuple[list[int], list[PromptLogprob]]:
        async with AsyncClient(url) as client, AsyncSequence(client, MODEL) as sequence:
            asked = sequence.generate(ids, 4, prompt_logprobs=3)
            async for _ in asked:
                pass
            return asked.tokens, asked.prompt_logprobs

    assert asyncio.run(other()) == (generation.tokens, generation.prompt_logprobs)
    with Client(url) as client, Sequence(client, MODEL) as sequence:
        outputs = sequence.step({"input_ids": np.array(ids)}, parameters={"prompt_logprobs": 3})
        assert decode_prompt_logprobs(outputs) == generation.prompt_logprobs
        outputs = sequence.step({"input_ids": np.array([5])})
        assert set(outputs) == {"next_token"}
        assert decode_prompt_logprobs(outputs) == []


def test_the_answer_to_a_text_has_its_tokens(served: Served) -> None:
    text = "Licensed under the Apache License"
    inputs = {"text": np.array([text.encode()], dtype=np.object_)}
    with Client(served.server.grpc_url) as client, Sequence(client, MODEL) as sequence:
        outputs = sequence.step(inputs, parameters={"prompt_logprobs": 2})
    check(served, decode_prompt_logprobs(outputs), tiny_tokenizer().encode(text).ids, 2)


def test_a_replay_answers_for_the_tokens_of_the_request(served: Served) -> None:
    ids = prompt(8, 12)
    with Client(served.server.grpc_url) as client, Sequence(client, MODEL) as sequence:
        sequence.tokens(ids[:7])
        sequence._tracker.replay_next()
        outputs = sequence.step({"input_ids": np.array(ids[7:])}, parameters={"prompt_logprobs": 0})
        answer = decode_prompt_logprobs(outputs)
    assert [each.token for each in answer] == ids[7:]
    assert all(each.logprob is not None for each in answer)


def test_the_generate_proxy_refuses(served: Served) -> None:
    [event] = served.events(input_ids=prompt(8, 9), max_tokens=2, prompt_logprobs=1)
    assert "parameter 'prompt_logprobs' belongs to steps and generations" in event["error"]


def test_wrong_numbers_are_refused(served: Served) -> None:
    with (
        Client(served.server.grpc_url) as client,
        Sequence(client, MODEL) as sequence,
        pytest.raises(RefusedError, match="'prompt_logprobs' is 21; expected a whole number"),
    ):
        sequence.step({"input_ids": np.array([5])}, parameters={"prompt_logprobs": 21})
