"""Sampling: the random numbers, what top-k and top-p keep, frequencies, reproducibility."""

from collections.abc import Callable

import pytest
import torch
from inplace.errors import Code, RequestError
from inplace.kernels.gumbel import (
    WEIGHT_BITS,
    exp_weights,
    gumbel_noise,
    philox,
    top_k_top_p_mask,
    uniforms,
)
from inplace.operators import argmax, sample
from inplace.parameters import Parameter
from inplace.plugins import OPERATIONS, SampleOperation
from inplace.runtime.requests import GREEDY, SamplingParams
from inplace_builder.capture.decoder import DecoderOptions, decoder_program
from support.long import long_except
from torch import Tensor

PROGRAM = decoder_program(99, 99, DecoderOptions(capacity=64, max_rows=4, chunk=8))


def row(
    temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0, position: int = 0
) -> list[Tensor]:
    return [
        torch.tensor([temperature]),
        torch.tensor([top_k], dtype=torch.int32),
        torch.tensor([top_p]),
        torch.tensor([seed]),
        torch.tensor([position], dtype=torch.int32),
    ]


def many(
    draws: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0
) -> list[Tensor]:
    """The parameters of one sequence at many positions."""
    parameters = [part.expand(draws) for part in row(temperature, top_k, top_p, seed)]
    return [*parameters[:4], torch.arange(draws, dtype=torch.int32)]


# --- the numbers ---


@pytest.mark.parametrize(
    ("counter", "seed", "words"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, -1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_has_the_known_answers_of_its_authors(
    counter: tuple[int, ...], seed: int, words: tuple[int, ...]
) -> None:
    """The known answers of philox4x32-10 in Random123's ``kat_vectors``."""
    assert tuple(int(word) for word in philox(counter, seed)) == words


def test_the_number_of_a_token_does_not_depend_on_the_vocabulary_size() -> None:
    full = uniforms(3, 5, 5000)
    for count in (1, 255, 1024, 1025, 4999):
        assert torch.equal(uniforms(3, 5, count), full[:count])
    assert len(full.unique()) > 4990
    assert not torch.equal(full, uniforms(4, 5, 5000))
    assert not torch.equal(full, uniforms(3, 6, 5000))


def test_uniform_numbers_are_uniform() -> None:
    numbers = uniforms(-7, 123, 1 << 16)
    assert float(numbers.min()) > 0
    assert float(numbers.max()) < 1
    expected = torch.full((64,), len(numbers) / 64)
    chi_square = float(((numbers.histc(64, 0, 1) - expected).square() / expected).sum())
    assert chi_square < 103.4  # 63 degrees of freedom, p = 0.001


def test_the_series_approximate_logarithm_and_exponential() -> None:
    edges = torch.tensor([2.0**-33, 2.0**-20, 0.5, 1 / 3, 1 - 2.0**-24])
    u = torch.cat([uniforms(1, 2, 1 << 16), edges])
    torch.testing.assert_close(
        gumbel_noise(u).double(), -(-torch.log1p(-u.double())).log(), rtol=1e-6, atol=1e-6
    )
    x = torch.linspace(-20, 0, 10_001)
    torch.testing.assert_close(
        exp_weights(x).double() / 2**WEIGHT_BITS,
        x.double().exp(),
        rtol=3e-6,
        atol=2.0**-WEIGHT_BITS,
    )
    assert exp_weights(torch.tensor([0.0, -28.0, -1e9, float("-inf")])).tolist() == [
        1 << WEIGHT_BITS,
        0,
        0,
        0,
    ]


# --- tokens ---


def test_temperature_zero_is_argmax_and_takes_the_first_of_equals() -> None:
    scores = (torch.randn(50, 300) * 2).round()
    parameters = [part.expand(50) for part in row(0.0, top_k=7, top_p=0.5, seed=9)]
    tokens = sample(scores, *parameters)
    assert torch.equal(tokens, argmax(scores))
    first_of_equals = (scores == scores.amax(1, keepdim=True)).int().argmax(1)
    assert torch.equal(tokens[:, 0], first_of_equals)


@pytest.mark.parametrize(
    ("temperature", "seed"), long_except([(1.0, 1), (3.0, -3)], [(1.0, 1), (0.5, 2), (3.0, -3)])
)
def test_tokens_are_as_frequent_as_they_are_probable(temperature: float, seed: int) -> None:
    scores = torch.tensor([2.0, 1.0, 0.5, 0.0, -0.5, -1.0, 1.5, 0.2])
    draws = 2000
    counts = (
        sample(scores.expand(draws, -1), *many(draws, temperature, seed=seed))
        .flatten()
        .bincount(minlength=8)
    )
    expected = (scores / temperature).softmax(0) * draws
    chi_square = float(((counts - expected).square() / expected).sum())
    assert chi_square < 24.3  # 7 degrees of freedom, p = 0.001


def test_kept_tokens_keep_their_proportions() -> None:
    scores = torch.tensor([2.0, 1.0, 0.5, 0.0, -0.5, -1.0, 1.5, 0.2])
    draws = 1500
    counts = (
        sample(scores.expand(draws, -1), *many(draws, top_k=4, top_p=0.8, seed=4))
        .flatten()
        .bincount(minlength=8)
    )
    # Of the best four: 0.455 + 0.276 is below 0.8, + 0.167 is not.
    kept = [0, 1, 6]
    assert counts.nonzero().flatten().tolist() == kept
    expected = scores[kept].softmax(0) * draws
    chi_square = float(((counts[kept] - expected).square() / expected).sum())
    assert chi_square < 13.8  # 2 degrees of freedom, p = 0.001


@pytest.mark.parametrize(
    "make", [lambda x: x, lambda x: x.round(), lambda x: x * 0], ids=["different", "ties", "equal"]
)
def test_top_k_and_top_p_keep_what_their_definition_says(make: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    for top_k, top_p, temperature in [
        (0, 0.5, 1.0),
        (1, 1.0, 1.0),
        (5, 1.0, 1.0),
        (5, 0.7, 0.5),
        (40, 0.999, 2.0),
        (7, 1e-6, 1.0),
    ]:
        scores = make(torch.randn(40) * 2)
        in_top_k = [i for i in range(40) if not 0 < top_k <= int((scores > scores[i]).sum())]
        mass = (scores.double() / temperature).exp()
        share = [
            float(mass[[j for j in in_top_k if scores[j] > scores[i]]].sum() / mass[in_top_k].sum())
            for i in in_top_k
        ]
        expected = [
            i for i, above in zip(in_top_k, share, strict=True) if top_p == 1 or above < top_p
        ]
        mask = top_k_top_p_mask(scores, torch.tensor(temperature), top_k, torch.tensor(top_p))
        assert mask.nonzero().flatten().tolist() == expected


def test_a_row_gives_the_same_token_alone_and_in_any_batch() -> None:
    torch.manual_seed(0)
    scores = torch.randn(9, 700)
    parameters = [
        torch.rand(9) * 2,
        torch.randint(0, 30, (9,)).int(),
        torch.rand(9),
        torch.randint(-9, 9, (9,)),
        torch.arange(9).int(),
    ]
    together = sample(scores, *parameters)
    order = torch.randperm(9)
    assert torch.equal(
        sample(scores[order], *(part[order] for part in parameters)), together[order]
    )
    for index in range(9):
        one = slice(index, index + 1)
        assert sample(scores[one], *(part[one] for part in parameters)) == together[index]


def test_the_plugin_checks_the_dtypes_of_its_inputs() -> None:
    plugin = SampleOperation(max_rows=9)
    assert OPERATIONS[plugin.name] is SampleOperation
    assert SampleOperation.from_fields(plugin.to_fields()) == plugin
    assert plugin.output_shapes([[5, 700], *[[5]] * 5]) == [[5, 1]]
    assert plugin.locks() == 9
    dtypes = [part.dtype for part in (torch.zeros(1), *row(), torch.zeros(1, dtype=torch.int64))]
    assert all(plugin.accepts(position, dtypes[: position + 1]) for position in range(7))
    assert not plugin.accepts(0, [torch.bfloat16])
    assert not plugin.accepts(4, [*dtypes[:4], torch.int32])


# --- parameters of requests ---


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({}, GREEDY),
        (
            {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "seed": -5},
            SamplingParams(0.7, 40, 0.9, -5),
        ),
        (
            {"temperature": "0.7", "top_k": "40", "top_p": "1", "seed": "-9223372036854775808"},
            SamplingParams(0.7, 40, 1.0, -(2**63)),
        ),
        (
            {"temperature": 1, "top_k": 99, "top_p": 1, "seed": 2**63 - 1},
            SamplingParams(1.0, 99, 1.0, 2**63 - 1),
        ),
        ({"temperature": "1e-2", "top_p": ".5"}, SamplingParams(0.01, 0, 0.5, 0)),
    ],
)
def test_parameters_are_numbers_or_their_text(
    parameters: dict[str, Parameter], expected: SamplingParams
) -> None:
    assert SamplingParams.parse(parameters, PROGRAM) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            ("temperature", value)
            for value in (
                -0.1,
                True,
                float("nan"),
                float("inf"),
                "nan",
                "inf",
                "warm",
                "",
                "1_0",
                1e39,
                10**400,
                "-1",
            )
        ),
        *(("top_k", value) for value in (-1, 100, 5.0, 1.5, True, "1.5", "", "9" * 5000)),
        *(("top_p", value) for value in (0, 0.0, -0.5, 1.0001, False, float("nan"), "0", "all")),
        *(
            ("seed", value)
            for value in (float(2**63), 2**63, -(2**63) - 1, str(2**63), 1.0, True, "x", "")
        ),
    ],
)
def test_a_bad_parameter_is_refused_by_name(name: str, value: Parameter) -> None:
    with pytest.raises(RequestError, match=f"^parameter '{name}' is .*; expected a ") as error:
        SamplingParams.parse({name: value}, PROGRAM)
    assert (error.value.code, error.value.retryable) == (Code.BAD_PARAMETER, False)
