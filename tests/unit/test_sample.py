"""Choosing tokens: the random numbers, what may be chosen, how often, and that nothing but seed and position matters."""

from collections.abc import Callable

import pytest
import torch
from inplace.errors import Code, RequestError
from inplace.kernels.gumbel import UNIT, gumbels, kept, philox, uniforms, weights
from inplace.operators import argmax, sample
from inplace.plugins import OPERATIONS, SampleOperation
from inplace.runtime.sampling import GREEDY, Parameter, SamplingParams
from support.interpreter import needs_interpreter, run_interpreted
from torch import Tensor


def row(
    temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0, position: int = 0
) -> list[Tensor]:
    whole = [torch.tensor([value], dtype=torch.int32) for value in (top_k, position)]
    return [
        torch.tensor([temperature]),
        whole[0],
        torch.tensor([top_p]),
        torch.tensor([seed]),
        whole[1],
    ]


def many(
    draws: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0
) -> list[Tensor]:
    """One sequence at many positions."""
    wanted = [part.expand(draws) for part in row(temperature, top_k, top_p, seed)]
    return [*wanted[:4], torch.arange(draws, dtype=torch.int32)]


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
def test_philox_gives_the_words_its_authors_publish(
    counter: tuple[int, ...], seed: int, words: tuple[int, ...]
) -> None:
    """The known answers of philox4x32-10 in Random123's ``kat_vectors``."""
    assert tuple(int(word) for word in philox(counter, seed)) == words


def test_a_token_s_number_does_not_depend_on_the_vocabulary() -> None:
    full = uniforms(3, 5, 5000)
    for count in (1, 255, 1024, 1025, 4999):
        assert torch.equal(uniforms(3, 5, count), full[:count])
    assert len(full.unique()) > 4990
    assert not torch.equal(full, uniforms(4, 5, 5000))
    assert not torch.equal(full, uniforms(3, 6, 5000))


def test_uniform_numbers_are_uniform() -> None:
    found = uniforms(-7, 123, 1 << 16)
    assert float(found.min()) > 0
    assert float(found.max()) < 1
    expected = torch.full((64,), len(found) / 64)
    assert (
        float(((found.histc(64, 0, 1) - expected).square() / expected).sum()) < 103.4
    )  # chi-square, 63 degrees, p = 0.001


def test_the_logarithm_and_the_exponential_are_those_of_mathematics() -> None:
    found = torch.cat(
        [uniforms(1, 2, 1 << 16), torch.tensor([2.0**-33, 2.0**-20, 0.5, 1 / 3, 1 - 2.0**-24])]
    )
    torch.testing.assert_close(
        gumbels(found).double(), -(-torch.log1p(-found.double())).log(), rtol=1e-6, atol=1e-6
    )
    x = torch.linspace(-20, 0, 10_001)
    torch.testing.assert_close(
        weights(x).double() / 2**UNIT, x.double().exp(), rtol=3e-6, atol=2.0**-UNIT
    )
    assert weights(torch.tensor([0.0, -28.0, -1e9, float("-inf")])).tolist() == [1 << UNIT, 0, 0, 0]


# --- what is chosen ---


def test_temperature_zero_is_argmax_and_takes_the_first_of_equals() -> None:
    scores = (torch.randn(50, 300) * 2).round()
    wanted = [part.expand(50) for part in row(0.0, top_k=7, top_p=0.5, seed=9)]
    assert torch.equal(sample(scores, *wanted), argmax(scores))
    assert torch.equal(
        sample(scores, *wanted)[:, 0], (scores == scores.amax(1, keepdim=True)).int().argmax(1)
    )


@pytest.mark.parametrize(("temperature", "seed"), [(1.0, 1), (0.5, 2), (3.0, -3)])
def test_tokens_come_as_often_as_their_probability_says(temperature: float, seed: int) -> None:
    scores = torch.tensor([2.0, 1.0, 0.5, 0.0, -0.5, -1.0, 1.5, 0.2])
    draws = 4000
    counts = (
        sample(scores.expand(draws, -1), *many(draws, temperature, seed=seed))
        .flatten()
        .bincount(minlength=8)
    )
    expected = (scores / temperature).softmax(0) * draws
    assert (
        float(((counts - expected).square() / expected).sum()) < 24.3
    )  # chi-square, 7 degrees, p = 0.001


def test_what_is_kept_keeps_its_proportions() -> None:
    scores = torch.tensor([2.0, 1.0, 0.5, 0.0, -0.5, -1.0, 1.5, 0.2])
    draws = 3000
    counts = (
        sample(scores.expand(draws, -1), *many(draws, top_k=4, top_p=0.8, seed=4))
        .flatten()
        .bincount(minlength=8)
    )
    assert counts.nonzero().flatten().tolist() == [
        0,
        1,
        6,
    ]  # of the best four: 0.455 + 0.276 is below 0.8, + 0.167 is not
    expected = scores[[0, 1, 6]].softmax(0) * draws
    assert (
        float(((counts[[0, 1, 6]] - expected).square() / expected).sum()) < 13.8
    )  # 2 degrees, p = 0.001


@pytest.mark.parametrize(
    "make", [lambda x: x, lambda x: x.round(), lambda x: x * 0], ids=["different", "ties", "equal"]
)
def test_what_is_kept_is_what_the_definition_says(make: Callable[[Tensor], Tensor]) -> None:
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
        by_number = [i for i in range(40) if not 0 < top_k <= int((scores > scores[i]).sum())]
        mass = (scores.double() / temperature).exp()
        share = [
            float(
                mass[[j for j in by_number if scores[j] > scores[i]]].sum() / mass[by_number].sum()
            )
            for i in by_number
        ]
        expected = [
            i for i, above in zip(by_number, share, strict=True) if top_p == 1 or above < top_p
        ]
        found = kept(scores, torch.tensor(temperature), top_k, torch.tensor(top_p))
        assert found.nonzero().flatten().tolist() == expected


def test_a_row_alone_and_in_any_batch_says_the_same() -> None:
    torch.manual_seed(0)
    scores = torch.randn(9, 700)
    wanted = [
        torch.rand(9) * 2,
        torch.randint(0, 30, (9,)).int(),
        torch.rand(9),
        torch.randint(-9, 9, (9,)),
        torch.arange(9).int(),
    ]
    together = sample(scores, *wanted)
    order = torch.randperm(9)
    assert torch.equal(sample(scores[order], *(part[order] for part in wanted)), together[order])
    for index in range(9):
        assert (
            sample(scores[index : index + 1], *(part[index : index + 1] for part in wanted))
            == together[index]
        )


@needs_interpreter
def test_the_kernel_equals_the_operator_in_the_interpreter() -> None:
    run_interpreted("interpreted_sample.py")


def test_the_plugin_says_what_it_takes() -> None:
    plugin = SampleOperation(max_rows=9)
    assert OPERATIONS[plugin.name] is SampleOperation
    assert SampleOperation.from_fields(plugin.to_fields()) == plugin
    assert plugin.output_shapes([[5, 700], *[[5]] * 5]) == [[5, 1]]
    assert plugin.locks() == 9
    dtypes = [part.dtype for part in (torch.zeros(1), *row(), torch.zeros(1, dtype=torch.int64))]
    assert all(plugin.accepts(position, dtypes[: position + 1]) for position in range(7))
    assert not plugin.accepts(0, [torch.bfloat16])
    assert not plugin.accepts(4, [*dtypes[:4], torch.int32])


# --- what a request asks for ---


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
def test_parameters_are_numbers_or_texts_that_spell_them(
    parameters: dict[str, Parameter], expected: SamplingParams
) -> None:
    assert SamplingParams.parse(parameters, 99) == expected


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
        SamplingParams.parse({name: value}, 99)
    assert (error.value.code, error.value.retryable) == (Code.BAD_PARAMETER, False)
