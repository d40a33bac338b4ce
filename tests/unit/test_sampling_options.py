"""Sampling options: what min-p keeps, log-probabilities, and which scores are adjusted how.

The references are transformers' logits processors, and for presence and frequency penalties vLLM's
``apply_penalties`` (``vllm/model_executor/layers/utils.py``).
"""

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from inplace.errors import Code, RequestError
from inplace.kernels.gumbel import MAX_LOGPROBS, log, min_p_mask
from inplace.operators import SampledTokens, argmax, sample, sample_with_options
from inplace.parameters import MAX_LOGPROBS as MOST_LOGPROBS
from inplace.parameters import Parameter
from inplace.plugins import SampleOptionsOperation
from inplace.runtime.batcher import sampling_values
from inplace.runtime.requests import GREEDY, SamplingParams, check_available
from inplace.runtime.sampling import ScoreAdjustments, token_mask
from inplace.schema.programs import Program
from inplace.schema.specs import SAMPLING_OPTION_ROLES, Role, mask_words
from inplace_builder.capture.decoder import DecoderOptions, decoder_program
from torch import Tensor
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

VOCABULARY = 99
PROGRAM = decoder_program(VOCABULARY, VOCABULARY, DecoderOptions(capacity=64, max_rows=4, chunk=8))
OLDER = PROGRAM.model_copy(
    update={
        "inputs": tuple(each for each in PROGRAM.inputs if each.role not in SAMPLING_OPTION_ROLES),
        "outputs": PROGRAM.outputs[:2],
    }
)


def run(
    scores: Tensor,
    temperature: float = 0.0,
    min_p: float = 0.0,
    logprobs: int | None = None,
    adjustments: ScoreAdjustments | None = None,
) -> SampledTokens:
    """The operator with the same options for all rows, each at its own position."""
    rows, entries = len(scores), PROGRAM.max_adjusted
    count = torch.zeros(rows, dtype=torch.int32)
    tokens, values = torch.zeros(rows, entries).int(), torch.zeros(rows, 3, entries)
    mask = torch.zeros(rows, mask_words(scores.shape[1]), dtype=torch.int32)
    if adjustments is not None:
        count += adjustments.number
        tokens += torch.from_numpy(adjustments.tokens)
        values += torch.from_numpy(adjustments.values)
        if adjustments.mask is not None:
            mask += torch.from_numpy(adjustments.mask)
    return sample_with_options(
        scores,
        torch.full((rows,), temperature),
        torch.zeros(rows, dtype=torch.int32),
        torch.ones(rows),
        torch.zeros(rows, dtype=torch.int64),
        torch.arange(rows, dtype=torch.int32),
        torch.full((rows,), min_p),
        torch.full((rows,), 0 if logprobs is None else logprobs + 1, dtype=torch.int32),
        count,
        tokens,
        values,
        mask,
    )


def adjustments(
    history: list[int], max_new_tokens: int = 8, program: Program = PROGRAM, **params: Any
) -> ScoreAdjustments:
    return ScoreAdjustments(
        SamplingParams(**params),
        history,
        program,
        max_new_tokens,
    )


def adjusted(scores: Tensor, given: ScoreAdjustments) -> Tensor:
    """All adjusted scores of a row, by their definition."""
    count = given.number if given.mask is None else -1 - given.number
    out = scores.clone()
    for token, (bias, penalty, less) in zip(
        given.tokens[:count].tolist(), given.values.T[:count].tolist(), strict=True
    ):
        value = float(scores[token]) + bias
        out[token] = (value / penalty if value > 0 else value * penalty) - less
    if given.mask is not None:
        bits = np.unpackbits(given.mask.view(np.uint8), bitorder="little")[: len(out)]
        out[torch.from_numpy(bits == 0)] = float("-inf")
    return out


# --- log-probabilities and min-p ---


def test_log_probabilities_are_those_of_log_softmax() -> None:
    torch.manual_seed(0)
    scores = torch.cat([torch.randn(20, 500) * 4, torch.randn(4, 500) * 200, torch.zeros(1, 500)])
    out = run(scores, temperature=1.5, logprobs=MAX_LOGPROBS)
    assert MOST_LOGPROBS == MAX_LOGPROBS
    expected = scores.double().log_softmax(-1)
    close = partial(torch.testing.assert_close, rtol=2e-6, atol=1e-5, check_dtype=False)
    close(out.token_logprobs, expected.gather(1, out.tokens))
    values, order = expected.sort(descending=True, stable=True)
    close(out.top_logprobs, values[:, :MAX_LOGPROBS])
    assert torch.equal(out.top_tokens, order[:, :MAX_LOGPROBS])
    assert len(out.tokens.unique()) > 5


def test_log_probabilities_are_of_the_scores_before_any_option() -> None:
    torch.manual_seed(1)
    scores = torch.randn(3, VOCABULARY)
    plain = run(scores, logprobs=3)
    banned = adjustments([], banned_token_ids=tuple(set(plain.tokens.flatten().tolist())))
    masked = run(scores, logprobs=3, adjustments=banned)
    assert not (masked.tokens == plain.tokens).any()
    assert torch.equal(masked.top_tokens, plain.top_tokens)
    expected = scores.log_softmax(-1).gather(1, masked.tokens)
    torch.testing.assert_close(masked.token_logprobs, expected, rtol=1e-5, atol=1e-5)


def test_where_few_scores_are_finite_fewer_tokens_are_likely() -> None:
    scores = torch.full((1, 5), float("-inf"))
    scores[0, 3] = 2.0
    out = run(scores, logprobs=2)
    assert (out.tokens.item(), out.token_logprobs.item()) == (3, 0.0)
    assert out.top_tokens[0, :2].tolist() == [3, -1]
    assert out.top_logprobs[0, :2].tolist() == [0.0, float("-inf")]


def test_the_logarithm_is_close() -> None:
    x = torch.logspace(-30, 6, 5000)
    torch.testing.assert_close(log(x).double(), x.double().log(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_min_p_keeps_what_transformers_keeps(temperature: float) -> None:
    torch.manual_seed(0)
    ids: Tensor = torch.zeros(1, 1, dtype=torch.long)
    for min_p in (1e-9, 0.01, 0.2, 0.9):
        scores = torch.randn(1, 400) * 3
        warped = MinPLogitsWarper(min_p)(ids, scores / temperature)
        kept = min_p_mask(scores[0], torch.tensor(temperature), torch.tensor(min_p))
        assert torch.equal(kept, warped[0] > float("-inf"))
    assert min_p_mask(scores[0], torch.tensor(temperature), torch.tensor(1.0)).sum() == 1


def test_tokens_that_min_p_drops_are_never_chosen() -> None:
    scores = torch.tensor([2.0, 1.0, 0.5, 0.0, -0.5, -1.0, 1.5, 0.2]).expand(1500, -1)
    counts = run(scores, temperature=1.0, min_p=0.35).tokens.flatten().bincount(minlength=8)
    kept = [0, 1, 6]  # e^-1 is 0.368, e^-1.5 is 0.223
    assert counts.nonzero().flatten().tolist() == kept
    expected = scores[0, kept].softmax(0) * 1500
    chi_square = float(((counts[kept] - expected).square() / expected).sum())
    assert chi_square < 13.8  # 2 degrees of freedom, p = 0.001


def test_without_options_the_tokens_are_those_of_sample() -> None:
    torch.manual_seed(0)
    scores = torch.randn(40, 300)
    assert torch.equal(run(scores).tokens, argmax(scores))
    expected = sample(
        scores,
        torch.full((40,), 1.5),
        torch.zeros(40).int(),
        torch.ones(40),
        torch.zeros(40, dtype=torch.int64),
        torch.arange(40).int(),
    )
    assert torch.equal(run(scores, temperature=1.5).tokens, expected)


# --- adjusted scores ---


def test_the_repetition_penalty_is_transformers() -> None:
    torch.manual_seed(0)
    history, scores = [3, 3, 50, 98, 0], torch.randn(1, VOCABULARY) * 3
    given = adjustments(history, repetition_penalty=1.7)
    processor = RepetitionPenaltyLogitsProcessor(1.7)
    for token in (None, 7, 3):
        if token is not None:
            assert given.advance(token)
            history.append(token)
        expected = processor(torch.tensor([history]), scores)
        torch.testing.assert_close(adjusted(scores[0], given), expected[0])
        assert torch.equal(run(scores, adjustments=given).tokens, argmax(expected))


def test_presence_and_frequency_penalties_are_vllms() -> None:
    torch.manual_seed(1)
    prompt, output = [4, 4, 9], [5, 6, 5]
    given = adjustments(
        prompt + output[:1],
        presence_penalty=0.7,
        frequency_penalty=-0.4,
        repetition_penalty=1.3,
        num_generated=1,
    )
    for token in output[1:]:
        given.advance(token)
    scores = torch.randn(VOCABULARY) * 3
    counts = torch.tensor(output).bincount(minlength=VOCABULARY)
    seen = torch.tensor(prompt + output).bincount(minlength=VOCABULARY) > 0
    logits = torch.where(seen, torch.where(scores > 0, scores / 1.3, scores * 1.3), scores)
    logits = logits - -0.4 * counts
    logits = logits - 0.7 * (counts > 0)
    torch.testing.assert_close(adjusted(scores, given), logits)


def test_biases_and_masks_are_transformers() -> None:
    torch.manual_seed(2)
    ids, scores = torch.tensor([[1, 2]]), torch.randn(1, VOCABULARY)
    biased = SequenceBiasLogitsProcessor({(7,): 2.5, (8,): -3.0})(ids, scores)
    given = adjustments([1, 2], logit_bias=((7, 2.5), (8, -3.0)))
    torch.testing.assert_close(adjusted(scores[0], given), biased[0])
    banned = SuppressTokensLogitsProcessor([4, 90])(ids, scores)
    given = adjustments([1, 2], banned_token_ids=(4, 90))
    assert torch.equal(adjusted(scores[0], given), banned[0])
    allowed = adjustments([1, 2], allowed_token_ids=(4, 5, 6), banned_token_ids=(5,))
    assert adjusted(scores[0], allowed).isfinite().nonzero().flatten().tolist() == [4, 6]
    hot = run(scores.expand(60, -1), temperature=50.0, adjustments=allowed)
    assert set(hot.tokens.flatten().tolist()) == {4, 6}
    penalised = adjustments([1, 5, 7], allowed_token_ids=(5, 6), repetition_penalty=9.0)
    processor = RepetitionPenaltyLogitsProcessor(9.0)
    expected = processor(torch.tensor([[5]]), scores)[0, 5:7]
    torch.testing.assert_close(adjusted(scores[0], penalised)[5:7], expected)
    assert penalised.number == -2


def test_a_mask_is_joined_with_the_tokens_that_the_request_allows() -> None:
    scores = torch.arange(VOCABULARY).float()[None]
    given = adjustments([], allowed_token_ids=(3, 31, 32, 98), banned_token_ids=(98,))
    assert given.set_mask(token_mask({3, 32, 50, 98}, VOCABULARY))
    assert adjusted(scores[0], given).isfinite().nonzero().flatten().tolist() == [3, 32]
    assert run(scores, adjustments=given).tokens.item() == 32
    assert not given.set_mask(token_mask({50, 98}, VOCABULARY))
    free = adjustments([], logit_bias=((98, -100.0),))
    assert free.set_mask(token_mask({31, 98}, VOCABULARY))
    assert run(scores, adjustments=free).tokens.item() == 31


def test_a_mask_of_another_size_is_not_of_the_program() -> None:
    inputs = [
        spec.model_copy(update={"shape": (3,)}) if spec.role is Role.TOKEN_MASK else spec
        for spec in PROGRAM.inputs
    ]
    with pytest.raises(ValueError, match=r"token_mask must be \[4\] a row, a bit for each of 99"):
        Program.model_validate(
            {**PROGRAM.model_dump(), "inputs": [spec.model_dump() for spec in inputs]}
        )


def test_end_tokens_are_masked_until_there_are_enough_tokens() -> None:
    scores, ids = torch.zeros(1, VOCABULARY), [1, 2]
    scores[0, 5], scores[0, 8] = 9.0, 8.0
    given = adjustments(ids, min_tokens=2, end_token_ids=frozenset({5}), logit_bias=((5, 1.0),))
    processor = MinNewTokensLengthLogitsProcessor(2, 2, [5], "cpu")
    for expected in (8, 8, 5):
        processed = processor(torch.tensor([ids]), scores)
        assert run(scores, adjustments=given).tokens.item() == argmax(processed).item() == expected
        ids.append(expected)
        given.advance(expected)
    assert adjusted(scores[0], given)[5] == 10


# --- what is refused ---


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ({"allowed_token_ids": (3,), "banned_token_ids": (3, 4)}, "no token is left"),
        ({"banned_token_ids": tuple(range(VOCABULARY))}, "no token is left"),
        (
            {"allowed_token_ids": (3,), "min_tokens": 1, "end_token_ids": frozenset({3})},
            "no token is left",
        ),
        (
            {"presence_penalty": 1.0, "num_generated": 4},
            "'num_generated' is 4; expected at most 3, the number of the sequence's tokens",
        ),
    ],
)
def test_adjustments_that_cannot_be_are_refused(params: dict[str, Any], reason: str) -> None:
    with pytest.raises(RequestError, match=reason) as refused:
        adjustments([1, 2, 3], **params)
    assert refused.value.code is Code.BAD_PARAMETER


def test_more_adjusted_scores_than_the_engine_takes_are_refused_before_a_step() -> None:
    inputs = {spec.role: spec for spec in PROGRAM.inputs}
    shapes = {Role.ADJUSTED_TOKENS: (8,), Role.ADJUSTMENTS: (3, 8)}
    small = PROGRAM.model_copy(
        update={
            "inputs": tuple(
                spec.model_copy(update={"shape": shapes.get(role, spec.shape)})
                for role, spec in inputs.items()
            )
        }
    )
    assert adjustments([1, 2, 3, 3], 5, small, repetition_penalty=2.0).number == 3
    with pytest.raises(RequestError, match=r"of 9 tokens \(3 now, 6 that may be generated\)"):
        adjustments([1, 2, 3, 3], 6, small, repetition_penalty=2.0)
    # a prompt counts for the repetition penalty alone, and biases do not become more
    assert adjustments([*range(50)], 8, small, presence_penalty=2.0).number == 0
    assert adjustments([*range(50)], 90, small, logit_bias=((1, 1.0),)).number == 1


@pytest.mark.parametrize(
    ("name", "value"), [("min_p", 0.5), ("logprobs", 0), ("logit_bias", "1:2"), ("top_k", 100)]
)
def test_an_engine_without_options_refuses_them_and_takes_what_asks_for_nothing(
    name: str, value: Parameter
) -> None:
    reason = "was built without this parameter" if name != "top_k" else "expected a whole number"
    with pytest.raises(RequestError, match=reason):
        SamplingParams.parse({name: value}, OLDER)
    neutral: dict[str, Parameter] = {"min_p": 0, "repetition_penalty": 1, "presence_penalty": "0"}
    assert SamplingParams.parse({**neutral, "top_p": 0.5}, OLDER) == SamplingParams(top_p=0.5)


def test_min_tokens_is_refused_with_what_to_build() -> None:
    check_available({"min_tokens": 0}, {"min_tokens": 0}, OLDER)
    check_available({"min_tokens": 2}, {"min_tokens": 2}, PROGRAM)
    greedy = OLDER.model_copy(
        update={"outputs": (OLDER.outputs[0].model_copy(update={"sampled_from": None}),)}
    )
    for program, advice in [(OLDER, "build it again"), (greedy, "build an engine that samples")]:
        with pytest.raises(RequestError, match=f"send 0 or leave it out, or {advice}"):
            check_available({"min_tokens": "2"}, {"min_tokens": 2}, program)


def test_inputs_of_greedy_rows_take_no_memory() -> None:
    spec = next(each for each in PROGRAM.inputs if each.role is Role.ADJUSTMENTS)
    inputs = [sampling_values(spec, [GREEDY] * 64, [None] * 64) for _ in range(2)]
    assert inputs[0] is inputs[1]
    assert inputs[0].shape == (64, *spec.shape)
    assert not inputs[0].any()
    assert inputs[0].untyped_storage().nbytes() == spec.dtype.as_torch.itemsize


@pytest.mark.parametrize("missing", SAMPLING_OPTION_ROLES)
def test_a_program_has_all_options_or_none(missing: Role) -> None:
    inputs = [spec.model_dump() for spec in PROGRAM.inputs if spec.role is not missing]
    with pytest.raises(ValueError, match="sampling options need an output that is sampled"):
        Program.model_validate({**PROGRAM.model_dump(), "inputs": inputs})


def test_the_plugin_describes_the_operator() -> None:
    plugin = SampleOptionsOperation(max_rows=9)
    assert SampleOptionsOperation.from_fields(plugin.to_fields()) == plugin
    arguments = [spec for spec in PROGRAM.inputs if spec.role in SAMPLING_OPTION_ROLES]
    shapes = [[5, 700], *[[5]] * 5, *([5, *spec.shape] for spec in arguments)]
    out = run(torch.zeros(5, 700))
    assert plugin.input_count == len(shapes)
    assert plugin.output_shapes(shapes) == [list(part.shape) for part in out]
    assert plugin.output_dtypes([]) == [part.dtype for part in out]
    assert replace(plugin, max_rows=3).locks() == 3
