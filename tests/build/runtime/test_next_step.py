"""The step that is formed ahead of the last one's tokens: what its rows would form when they have them."""

import torch
from inplace.runtime.batcher import form_batch, next_decode_batch
from inplace.runtime.instance import ModelInstance
from inplace.runtime.requests import Request
from support.driving import prompt
from support.models import SLOTS, Repository, open_instance


def test_the_step_that_follows_is_what_its_rows_would_form(repository: Repository) -> None:
    instance: ModelInstance = open_instance(repository.path / "llama")
    chances = [
        {},
        {"temperature": 0.7, "seed": 5},
        {"temperature": 1.1, "top_k": 3, "top_p": 0.9, "seed": 2**40},
        {},
    ][:SLOTS]
    works = [
        instance.admit(
            Request(
                f"s{row}",
                True,
                False,
                {"input_ids": torch.tensor([prompt(row, 1 + row)])},
                parameters=chance,
            )
        )
        for row, chance in enumerate(chances)
    ]
    while pending := [work for work in works if not work.finished]:
        instance.step(pending)
    for work in works:
        work.feed(7)
    batch = form_batch(instance.program, works)
    for said in ([4, 5, 6, 7], [9, 8, 9, 8], [1, 1, 1, 1]):
        batch = next_decode_batch(instance.program, batch, torch.tensor(said[:SLOTS])[:, None])
        for work, token in zip(works, said, strict=False):
            work.sequence.length += 1
            work.feed(token)
        wanted = form_batch(instance.program, works)
        assert (batch.rows, batch.num_scheduled_tokens, list(batch.inputs)) == (
            wanted.rows,
            wanted.num_scheduled_tokens,
            list(wanted.inputs),
        )
        for name, tensor in wanted.inputs.items():
            assert batch.inputs[name].dtype == tensor.dtype, name
            assert torch.equal(batch.inputs[name], tensor), name
