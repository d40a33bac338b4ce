"""Conversations: what clients send, and the model's answers to a sequence alone."""

import random
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from inplace.parameters import Parameter
from inplace.runtime.instance import ModelInstance
from inplace.runtime.requests import Request
from support.models import VOCABULARY

CAPACITY = 96


@dataclass(frozen=True)
class Turn:
    """Tokens that the client sends, and those that the model generates next."""

    new: list[int]
    generated: list[int]


@dataclass(frozen=True)
class Song:
    """A conversation of one sequence: the same tokens by steps or by generations."""

    turns: list[Turn]
    parameters: Mapping[str, Parameter]

    def begins(self, turn: int, collected: list[int]) -> bool:
        """Whether this is how the turn's answer begins."""
        return self.turns[turn].generated[: len(collected)] == collected


def songbook(instance: ModelInstance, seed: int, songs: int) -> list[Song]:
    """So many conversations, each run alone in an engine of this process."""
    return [
        _sung_alone(instance, random.Random(f"{seed} song {number}")) for number in range(songs)
    ]


def _sung_alone(instance: ModelInstance, rng: random.Random) -> Song:
    parameters: dict[str, Parameter] = {}
    if rng.random() < 0.5:
        parameters = {
            "temperature": rng.choice(("0.7", "1.3")),
            "seed": rng.getrandbits(60),
            "top_k": rng.choice((0, 20)),
        }
        parameters["top_p"] = rng.choice(("1", "0.9"))
    turns: list[Turn] = []
    pending: list[int] = []
    for number in range(rng.choice((1, 1, 2, 3))):
        new = [
            rng.randrange(VOCABULARY)
            for _ in range(rng.choice((1, 4, 12, 30)) if number == 0 else rng.randint(1, 5))
        ]
        generated = [_step(instance, pending + new, number == 0, parameters)]
        for _ in range(rng.randint(2, 19)):
            generated.append(_step(instance, generated[-1:], False, parameters))
        turns.append(Turn(new, generated))
        pending = generated[-1:]  # as after a generation: not fed yet
    instance.finish(
        instance.admit(Request("alone", False, True, {"input_ids": torch.tensor([[0]])}))
    )
    return Song(turns, parameters)


def _step(
    instance: ModelInstance, ids: list[int], start: bool, parameters: Mapping[str, Parameter]
) -> int:
    active = instance.admit(
        Request("alone", start, False, {"input_ids": torch.tensor([ids])}, parameters=parameters)
    )
    while not active.finished:
        instance.step([active])
    instance.finish(active)
    return int(active.outputs["next_token"])
