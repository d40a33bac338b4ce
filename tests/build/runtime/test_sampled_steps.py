"""Sampled tokens of a real engine depend on seed and position only, and are the operator's."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from inplace.errors import Code
from inplace.operators import sample
from support.driving import (
    OpenDriver,
    assert_refused,
    next_token,
    outputs_of,
    random_tokens,
    run_one,
    step_request,
    sum_request,
)
from support.models import VOCABULARY, Repository

HOT: dict[str, Any] = {"temperature": 2.0, "top_k": 100, "top_p": 0.95, "seed": 11}


def test_the_token_depends_on_seed_and_position_not_on_row_batch_or_chunk(
    repository: Repository, drive: OpenDriver
) -> None:
    ids = random_tokens(3, 20)
    alone = drive(repository.path / "llama")
    [first] = alone.run([step_request(1, ids, start=True, **HOT)])  # in chunks of 8
    expected = next_token(first)
    alone.run([step_request(2, ids[:1], start=True)])
    others = [
        step_request(10 + other, random_tokens(other, 5), start=True, **HOT, logits=True)
        for other in range(3)
    ]
    alone.run([step_request(3, ids[:13], start=True, temperature=0.3)])
    # Another slot, and another split of the prompt into requests.
    for part, request in enumerate([*others, step_request(3, ids[13:], **HOT)]):
        [answer] = alone.run([request])
        if part == 3:
            assert next_token(answer) == expected
    alone.run([step_request(4, ids[:19], start=True)])
    together = alone.run(
        [
            step_request(2, [5], **HOT),
            step_request(4, ids[19:], **HOT),
            step_request(10, [7], **HOT),
        ]
    )
    assert next_token(together[1]) == expected
    tokens = {
        seed: next_token(
            run_one(alone, step_request(20, ids, start=True, **(HOT | {"seed": seed})))
        )
        for seed in range(12)
    }
    assert len(set(tokens.values())) > 3


def test_the_token_is_the_one_that_the_operator_samples_from_the_scores(
    repository: Repository, drive: OpenDriver
) -> None:
    driver = drive(repository.path / "llama")
    for start, ids in ((True, random_tokens(1, 11)), (False, [4]), (False, [9, 9])):
        [answer] = driver.run([step_request(1, ids, start=start, **HOT, logits=True)])
        length = driver.instance.table.find(1).length
        chosen = sample(
            outputs_of(answer)["logits"],
            torch.tensor([HOT["temperature"]]),
            torch.tensor([HOT["top_k"]], dtype=torch.int32),
            torch.tensor([HOT["top_p"]]),
            torch.tensor([HOT["seed"]]),
            torch.tensor([length], dtype=torch.int32),
        )
        assert outputs_of(answer)["next_token"] == chosen


def test_an_invalid_parameter_is_refused_alone_and_changes_nothing(
    repository: Repository, drive: OpenDriver
) -> None:
    driver = drive(repository.path / "llama")
    ids = random_tokens(2, 6)
    driver.run([step_request(1, ids, start=True), step_request(2, ids, start=True)])
    bad, good = driver.run(
        [step_request(1, [3], temperature=0.5, top_k=VOCABULARY + 1), step_request(2, [3])]
    )
    assert_refused(
        bad,
        Code.BAD_PARAMETER,
        f"'top_k' is {VOCABULARY + 1}; expected a whole number from 0 (all) to {VOCABULARY}",
    )
    assert next_token(run_one(driver, step_request(1, [3]))) == next_token(good)


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"temperature": 0.5}, "this engine does not sample"),
        ({"top_k": 5}, "this engine does not sample"),
        ({"top_p": 0.5}, "this engine does not sample"),
        ({"seed": 3, "temperature": 0}, "this engine does not sample"),
        ({"top_p": "half"}, "'top_p' is 'half'"),
        ({"add_special_tokens": True}, "is for requests with the input 'text'"),
    ],
)
def test_what_a_step_cannot_use_is_refused(
    repository: Repository, drive: OpenDriver, parameters: dict[str, Any], reason: str
) -> None:
    driver = drive(repository.path / "accumulator")
    request = sum_request(1, 1.0, start=True)
    answers = driver.run([replace(request, parameters=parameters)])
    assert_refused(answers[0], Code.BAD_PARAMETER, reason)
    absent = {"temperature": 0, "top_k": 0, "top_p": 1, "seed": 0, "add_special_tokens": False}
    outputs_of(run_one(driver, replace(request, parameters=absent)))
