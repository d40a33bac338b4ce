"""Sampled tokens of a real engine: they depend on seed and position only, and equal the operator's choice."""

from dataclasses import replace
from typing import Any

import torch
from inplace.errors import Code
from inplace.operators import sample
from support.driving import Open, add, ask, outputs, prompt, refused, token
from support.models import VOCABULARY, Repository

HOT: dict[str, Any] = {"temperature": 2.0, "top_k": 100, "top_p": 0.95, "seed": 11}


def test_the_token_depends_on_seed_and_position_not_on_row_batch_or_chunk(
    repository: Repository, drive: Open
) -> None:
    ids = prompt(3, 20)
    alone = drive(repository.path / "llama")
    [first] = alone.run([ask(1, ids, start=True, **HOT)])  # in chunks of 8
    expected = token(first)
    alone.run([ask(2, ids[:1], start=True)])
    others = [
        ask(10 + other, prompt(other, 5), start=True, **HOT, logits=True) for other in range(3)
    ]
    alone.run([ask(3, ids[:13], start=True, temperature=0.3)])
    for part, request in enumerate([*others, ask(3, ids[13:], **HOT)]):  # another slot, another cut
        [answer] = alone.run([request])
        if part == 3:
            assert token(answer) == expected
    alone.run([ask(4, ids[:19], start=True)])
    together = alone.run([ask(2, [5], **HOT), ask(4, ids[19:], **HOT), ask(10, [7], **HOT)])
    assert token(together[1]) == expected
    said = {
        seed: token(alone.run([ask(20, ids, start=True, **(HOT | {"seed": seed}))])[0])
        for seed in range(12)
    }
    assert len(set(said.values())) > 3


def test_the_token_is_the_operator_s_choice_from_the_scores(
    repository: Repository, drive: Open
) -> None:
    driver = drive(repository.path / "llama")
    for start, ids in ((True, prompt(1, 11)), (False, [4]), (False, [9, 9])):
        [answer] = driver.run([ask(1, ids, start=start, **HOT, logits=True)])
        length = driver.instance.table.find(1).length
        chosen = sample(
            outputs(answer)["logits"],
            torch.tensor([HOT["temperature"]]),
            torch.tensor([HOT["top_k"]], dtype=torch.int32),
            torch.tensor([HOT["top_p"]]),
            torch.tensor([HOT["seed"]]),
            torch.tensor([length], dtype=torch.int32),
        )
        assert outputs(answer)["next_token"] == chosen


def test_a_bad_parameter_changes_nothing_and_harms_no_batch_mate(
    repository: Repository, drive: Open
) -> None:
    driver = drive(repository.path / "llama")
    ids = prompt(2, 6)
    driver.run([ask(1, ids, start=True), ask(2, ids, start=True)])
    bad, good = driver.run([ask(1, [3], temperature=0.5, top_k=VOCABULARY + 1), ask(2, [3])])
    refused(
        bad,
        Code.BAD_PARAMETER,
        f"parameter 'top_k' is {VOCABULARY + 1}; expected a whole number from 0 (all) to {VOCABULARY}",
    )
    assert token(driver.run([ask(1, [3])])[0]) == token(good)


def test_an_engine_that_samples_nothing_says_so(repository: Repository, drive: Open) -> None:
    driver = drive(repository.path / "accumulator")
    request = add(1, 1.0, start=True)
    hot, cold = (replace(request, parameters={"temperature": heat}) for heat in (0.5, 0))
    answers = driver.run([hot])
    refused(answers[0], Code.BAD_PARAMETER, "this engine does not sample")
    outputs(driver.run([cold])[0])
