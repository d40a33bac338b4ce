"""The decode batch formed from the last one and its tokens equals one formed from its rows."""

import torch
from inplace.runtime.batcher import form_batch, next_decode_batch
from inplace.runtime.instance import ModelInstance
from inplace.runtime.requests import Request
from support.driving import random_tokens
from support.models import SLOTS, Repository, open_instance


def test_the_next_decode_batch_is_what_its_rows_would_form(repository: Repository) -> None:
    instance: ModelInstance = open_instance(repository.path / "llama")
    parameters = [
        {},
        {"temperature": 0.7, "seed": 5},
        {"temperature": 1.1, "top_k": 3, "top_p": 0.9, "seed": 2**40},
        {},
    ][:SLOTS]
    rows = [
        instance.admit(
            Request(
                f"s{row}",
                True,
                False,
                {"input_ids": torch.tensor([random_tokens(row, 1 + row)])},
                parameters=sampling,
            )
        )
        for row, sampling in enumerate(parameters)
    ]
    while pending := [active for active in rows if not active.finished]:
        instance.step(pending)
    for active in rows:
        active.feed(7)
    batch = form_batch(instance.program, rows)
    for tokens in ([4, 5, 6, 7], [9, 8, 9, 8], [1, 1, 1, 1]):
        batch = next_decode_batch(instance.program, batch, torch.tensor(tokens[:SLOTS])[:, None])
        for active, token in zip(rows, tokens, strict=False):
            active.sequence.length += 1
            active.feed(token)
        expected = form_batch(instance.program, rows)
        assert (batch.rows, batch.num_scheduled_tokens, list(batch.inputs)) == (
            expected.rows,
            expected.num_scheduled_tokens,
            list(expected.inputs),
        )
        for name, tensor in expected.inputs.items():
            assert batch.inputs[name].dtype == tensor.dtype, name
            assert torch.equal(batch.inputs[name], tensor), name
