"""Sampling options through the drivers give the tokens of transformers and of a replay."""

from typing import Any

import pytest
import torch
from inplace.errors import Code
from support.driving import (
    OpenDriver,
    assert_refused,
    next_token,
    outputs_of,
    random_tokens,
    run_one,
    step_request,
)
from support.models import VOCABULARY, Repository, greedy
from support.streaming import OpenStreams, RecordingChannel
from torch import Tensor
from transformers import LlamaForCausalLM

PROMPT = random_tokens(5, 13)


def generated(model: LlamaForCausalLM, prompt: list[int], **options: Any) -> list[int]:
    """transformers' greedy continuation of 16 tokens."""
    ids = torch.tensor([prompt])
    arguments = {"eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 16, **options}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **arguments)
    return list(out[0, len(prompt) :].tolist())


def last_scores(model: LlamaForCausalLM, ids: list[int]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits
    return logits[0, -1].float()


def logprobs_of(channel: RecordingChannel, name: str) -> Tensor:
    """An output of all responses of a generation: of each token."""
    parts = [response[name][0] for response in channel.responses]
    return torch.cat([part for part in parts if isinstance(part, Tensor)])


def test_penalties_biases_and_masks_give_the_tokens_of_transformers(
    streams: OpenStreams, repository: Repository
) -> None:
    client, model = streams(), repository.llama
    plain = greedy(model, PROMPT, 16)
    first, second = plain[0], next(token for token in plain if token != plain[0])
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {}),
        ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
        ({"banned_token_ids": f"{first},{second}"}, {"suppress_tokens": [first, second]}),
        ({"logit_bias": f"{first}:-3.5,9:4"}, {"sequence_bias": {(first,): -3.5, (9,): 4.0}}),
        (
            {"repetition_penalty": 0.7, "logit_bias": "9:2.5", "banned_token_ids": first},
            {"repetition_penalty": 0.7, "sequence_bias": {(9,): 2.5}, "suppress_tokens": [first]},
        ),
    ]
    channels = [
        client.generate(f"s{index}", PROMPT, **ours) for index, (ours, _) in enumerate(cases)
    ]
    for channel, (_, theirs) in zip(channels, cases, strict=True):
        assert channel.finish_reason == "length"
        assert channel.tokens == generated(model, PROMPT, **theirs)
    assert len({tuple(channel.tokens) for channel in channels}) == len(cases)


def test_presence_and_frequency_penalties_count_what_was_generated(
    streams: OpenStreams, repository: Repository
) -> None:
    expected: list[int] = []
    for _ in range(16):  # as vLLM's `apply_penalties`
        scores = last_scores(repository.llama, PROMPT + expected)
        counts = torch.tensor(expected, dtype=torch.int64).bincount(minlength=VOCABULARY)
        scores -= 0.9 * counts + 0.6 * (counts > 0)
        expected.append(int(scores.argmax()))
    penalties: dict[str, Any] = {"frequency_penalty": 0.9, "presence_penalty": 0.6}
    channel = streams().generate("a", PROMPT, **penalties)
    assert channel.finish_reason == "length"
    assert channel.tokens == expected != greedy(repository.llama, PROMPT, 16)


def test_log_probabilities_are_those_of_the_model(
    streams: OpenStreams, repository: Repository
) -> None:
    client = streams()
    asks, others = client.generate("a", PROMPT, logprobs=3), client.generate("b", PROMPT)
    only = client.generate("c", PROMPT, logprobs="0", temperature=2.0, seed=3, stream_interval=4)
    assert asks.wait().tokens == others.wait().tokens == greedy(repository.llama, PROMPT, 16)
    for channel in (asks, only.wait()):
        for place, token in enumerate(channel.tokens):
            scores = last_scores(repository.llama, PROMPT + channel.tokens[:place])
            expected = scores.log_softmax(-1)
            value = logprobs_of(channel, "token_logprobs")[place]
            torch.testing.assert_close(value, expected[token], rtol=1e-4, atol=1e-4)
            if channel is asks:
                tokens = logprobs_of(channel, "top_tokens")[place]
                assert tokens.tolist() == expected.topk(3).indices.tolist()
                torch.testing.assert_close(
                    logprobs_of(channel, "top_logprobs")[place],
                    expected[tokens],
                    rtol=1e-4,
                    atol=1e-4,
                )
    assert len(logprobs_of(only, "token_logprobs")) == 16
    names = {"token_logprobs", "top_logprobs", "top_tokens"}
    assert not any(names & response.keys() for response in others.responses)
    assert not any(names - {"token_logprobs"} & response.keys() for response in only.responses)


HOT: dict[str, Any] = {
    "temperature": 1.7,
    "seed": 11,
    "min_p": 0.02,
    "repetition_penalty": 1.2,
    "presence_penalty": 0.8,
    "frequency_penalty": 0.5,
    "logit_bias": "3:1.5",
    "banned_token_ids": 4,
}


FEW: dict[str, Any] = {"allowed_token_ids": "3,9,40,41", "frequency_penalty": 2.0}


@pytest.mark.parametrize(("options", "cut"), [(HOT, 1), (HOT, 7), (FEW, 7)])
def test_a_replay_that_says_what_was_generated_has_the_same_tokens(
    streams: OpenStreams, options: dict[str, Any], cut: int
) -> None:
    client = streams()
    tokens = client.generate("a", PROMPT, **options).wait().tokens
    assert len(tokens) == 16
    others = [client.generate(f"o{index}", [index + 1], 12, **HOT) for index in range(2)]
    replayed = client.generate("b", PROMPT + tokens[:cut], 16 - cut, **options, num_generated=cut)
    assert replayed.wait().tokens == tokens[cut:]
    if options is FEW:
        unaware = client.generate("c", PROMPT + tokens[:cut], 16 - cut, **FEW)
        assert unaware.wait().tokens != tokens[cut:]
    for other in others:
        other.wait()


def test_a_step_counts_what_its_client_generated(
    streams: OpenStreams, repository: Repository, drive: OpenDriver
) -> None:
    expected = streams().generate("a", PROMPT, **HOT).wait().tokens
    driver, ids = drive(repository.path / "llama"), PROMPT
    for place in range(16):
        request = step_request(1, ids, start=place == 0, **HOT, num_generated=place, logprobs=2)
        outputs = outputs_of(run_one(driver, request))
        assert int(outputs["next_token"]) == expected[place]
        assert outputs["token_logprobs"].shape == (1, 1)
        assert outputs["top_logprobs"].shape == outputs["top_tokens"].shape == (1, 1, 2)
        ids = [expected[place]]
    refused = run_one(driver, step_request(1, ids, presence_penalty=1.0))
    assert_refused(refused, Code.BAD_PARAMETER, "of a step need 'num_generated'")
    refused = run_one(driver, step_request(1, ids, presence_penalty=1.0, num_generated=30))
    assert_refused(refused, Code.BAD_PARAMETER, "expected at most 29, the number of the sequence's")
    assert "logits" not in outputs_of(run_one(driver, step_request(1, ids, logprobs=0)))


def test_end_and_stop_tokens_wait_for_the_fewest_tokens(
    streams: OpenStreams, repository: Repository
) -> None:
    client, model = streams(), repository.llama
    plain = greedy(model, PROMPT, 16)
    stop = plain[2]
    early = client.generate("a", PROMPT, stop_token_ids=stop)
    late = client.generate("b", PROMPT, stop_token_ids=stop, min_tokens=6)
    assert (early.finish_reason, early.tokens) == ("stop", plain[: plain.index(stop) + 1])
    expected = generated(model, PROMPT, eos_token_id=stop, min_new_tokens=6)
    assert late.wait().tokens == expected
    assert len(expected) > 6
    refused = client.generate("c", PROMPT, 5, min_tokens=6)
    refused.assert_refused(Code.BAD_PARAMETER, "'min_tokens' is 6; expected at most 5, which is")


def test_only_allowed_tokens_are_chosen_and_none_left_is_refused(
    streams: OpenStreams, repository: Repository
) -> None:
    client, allowed = streams(), [3, 9, 40]
    channel = client.generate("a", PROMPT, allowed_token_ids="3,9,40", temperature=1.0, logprobs=1)
    assert set(channel.wait().tokens) <= set(allowed)
    scores = last_scores(repository.llama, PROMPT)
    again = client.generate("b", PROMPT, 1, allowed_token_ids="3,9,40")
    assert again.wait().tokens == [allowed[int(scores[allowed].argmax())]]
    free = client.num_free_slots()
    refused = client.generate("c", PROMPT, allowed_token_ids=3, banned_token_ids="3,4")
    refused.assert_refused(Code.BAD_PARAMETER, "no token is left that may be chosen")
    client.generate("d", PROMPT, allowed_token_ids=VOCABULARY).assert_refused(
        Code.BAD_PARAMETER, f"expected token ids below {VOCABULARY}"
    )
    assert client.num_free_slots() == free


def test_rows_with_and_without_options_share_steps_and_do_not_touch_one_another(
    repository: Repository, drive: OpenDriver
) -> None:
    driver = drive(repository.path / "llama")
    ids = [random_tokens(seed, 9) for seed in range(3)]
    options: list[dict[str, Any]] = [{}, {"logprobs": 2, "logit_bias": "1:50"}, {"min_p": 0.5}]
    alone = [
        run_one(driver, step_request(1 + row, ids[row], start=True, **options[row]))
        for row in range(3)
    ]
    together = driver.run(
        [step_request(1 + row, ids[row], start=True, **options[row]) for row in range(3)]
    )
    assert [next_token(answer) for answer in together] == [next_token(each) for each in alone]
    assert next_token(together[1]) == 1
    assert next_token(together[0]) == greedy(repository.llama, ids[0], 1)[0]
