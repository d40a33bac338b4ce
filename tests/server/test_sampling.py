"""Sampling on a real tritonserver: a sequence depends on its seed, not on its neighbours."""

import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from inplace.client import Sequence
from inplace_builder.tools.tritonserver import TritonServer
from support.models import Repository, greedy
from support.streams import prompt, split
from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

pytestmark = pytest.mark.server

TOKENS = 16


def sampled(
    sequence: Sequence, parts: list[list[int]], **parameters: str | int | bool
) -> list[int]:
    """The prompt in parts, then each token; gRPC parameters have no floats, so texts carry them."""
    for part in parts[:-1]:
        sequence.tokens(part)
    generated: list[int] = []
    ids = parts[-1]
    while len(generated) < TOKENS:
        answer = sequence.step(
            {"input_ids": np.array(ids)}, parameters=parameters, outputs=("next_token",)
        )
        ids = [int(answer["next_token"][0])]
        generated += ids
    return generated


def test_a_seed_says_the_same_alone_in_company_and_in_parts(
    server: TritonServer, repository: Repository
) -> None:
    ids = prompt(5, 21)

    def stream(seed: int, cut: int) -> list[int]:
        with InferenceServerClient(server.grpc_url) as own, Sequence(own, "llama") as sequence:
            parts = split(ids, random.Random(cut)) if cut else [ids]
            return sampled(sequence, parts, temperature="0.9", top_k=64, top_p="0.95", seed=seed)

    alone = [stream(seed, 0) for seed in (1, 2)]
    with ThreadPoolExecutor(6) as pool:
        company = list(pool.map(stream, (1, 2, 3, 1, 2, 2**63 - 1), range(1, 7)))
    assert [company[index] for index in (0, 3)] == [alone[0]] * 2
    assert [company[index] for index in (1, 4)] == [alone[1]] * 2
    assert len({tuple(generated) for generated in company}) == 4
    assert greedy(repository.llama, ids, TOKENS) not in company


def test_temperature_zero_is_greedy(client: InferenceServerClient, repository: Repository) -> None:
    ids = prompt(6, 9)
    with Sequence(client, "llama") as sequence:
        assert sampled(sequence, [ids], temperature=0, top_k=3, seed=8) == greedy(
            repository.llama, ids, TOKENS
        )


@pytest.mark.parametrize(
    ("parameters", "expected_output"),
    [
        (
            {"temperature": "hot"},
            "parameter 'temperature' is 'hot'; expected a finite number of at least 0",
        ),
        ({"temperature": True}, "parameter 'temperature' is True; expected"),
        (
            {"temperature": 1, "top_k": -1},
            "parameter 'top_k' is -1; expected a whole number from 0",
        ),
        (
            {"temperature": 1, "top_p": "1.5"},
            "parameter 'top_p' is '1.5'; expected a number above 0, at most 1",
        ),
        ({"seed": str(2**63)}, f"parameter 'seed' is '{2**63}'; expected a whole number from"),
    ],
)
def test_a_bad_parameter_is_named(
    client: InferenceServerClient, parameters: dict[str, str | int | bool], expected_output: str
) -> None:
    with Sequence(client, "llama") as sequence:
        sequence.tokens([1, 2])
        with pytest.raises(InferenceServerException) as refused:
            sequence.step({"input_ids": np.array([3])}, parameters=parameters)
        assert refused.value.message().startswith("INPLACE-BAD_PARAMETER retryable=0 ")
        assert expected_output in refused.value.message()
        sequence.tokens([3])
