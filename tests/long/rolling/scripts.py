"""What a sequence does, turn by turn, and the values that it must get: those of a run alone."""

import asyncio
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol

import numpy as np
from inplace.client import AsyncSequence
from inplace.client.requests import Array
from rolling.models import DECODERS, LOOKAHEAD, decoder
from support.decoding import generate, random_prompt
from support.nemotron import FACTOR, HOP, SAMPLE_RATE, log_mel, offline, speech, tiny_nemotron
from support.whisper import RATE, audio, generated, tiny_whisper
from transformers import PreTrainedModel

TURNS, NEW_TOKENS = 12, 8


class Script(Protocol):
    """Turns of one sequence."""

    async def run(
        self, sequence: AsyncSequence, turn: int, draw: random.Random, heard: list[int]
    ) -> int:
        """Run a turn and compare it; how many values were compared.

        Args:
            sequence: which has had the turns before.
            turn: the number of the turn.
            draw: for pauses.
            heard: the tokens of the turns before, to which this one adds its own.

        Raises:
            WrongError: a value differs.
        """


class WrongError(Exception):
    """A value that a server gave is not that of the run alone."""


def check(name: str, turn: int, given: object, expected: object) -> None:
    if given != expected:
        raise WrongError(f"{name}, turn {turn}: {given} instead of {expected}")


@cache
def model_of(kind: str) -> PreTrainedModel:
    return decoder(kind)


@dataclass
class Chat:
    """A conversation of token ids, greedy; transformers computes what is expected."""

    kind: str
    seed: int
    expected: list[list[int]] = field(default_factory=list)

    def prompt(self, turn: int) -> list[int]:
        return random_prompt(1000 * self.seed + turn, 3 + (turn + self.seed) % 9)

    def prepare(self) -> None:
        history: list[int] = []
        for turn in range(TURNS):
            history += self.prompt(turn)
            self.expected.append(generate(model_of(self.kind), history, NEW_TOKENS))
            history += self.expected[-1]

    async def run(
        self, sequence: AsyncSequence, turn: int, draw: random.Random, heard: list[int]
    ) -> int:
        generation = sequence.generate(self.prompt(turn), NEW_TOKENS, text=False, ignore_eos=True)
        async for _ in generation:
            await asyncio.sleep(draw.uniform(0.0, 0.1))  # servers end in the middle of a turn
        check(f"{self.kind} {self.seed}", turn, generation.tokens, self.expected[turn])
        return len(generation.tokens)


@dataclass
class Windows:
    """Windows of audio for Whisper, each with tokens of its own."""

    seed: int
    expected: list[list[int]] = field(default_factory=list)

    def prepare(self) -> None:
        model = tiny_whisper()
        self.expected = [
            generated(model, audio(100 * self.seed + turn), {"timestamps": True})
            for turn in range(TURNS)
        ]

    async def run(
        self, sequence: AsyncSequence, turn: int, draw: random.Random, heard: list[int]
    ) -> int:
        await asyncio.sleep(draw.uniform(0.0, 0.5))
        outputs = await sequence.step(
            {"audio": audio(100 * self.seed + turn)},
            parameters={"sample_rate": RATE, "timestamps": True},
        )
        tokens = outputs["tokens"].reshape(-1).tolist()
        check(f"whisper {self.seed}", turn, tokens, self.expected[turn])
        return len(tokens)


@dataclass
class Speech:
    """A stream of audio for a recogniser with an RNN-T, which nobody can compute again."""

    seed: int
    parts: list[Array] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def prepare(self) -> None:
        chunk = HOP * FACTOR * (LOOKAHEAD + 1)
        samples = speech(self.seed, TURNS * chunk + 700)
        self.parts = [part.numpy() for part in samples.split(chunk * 7 // 8)][:TURNS]
        whole = np.concatenate(self.parts)
        mel = log_mel(samples[: len(whole)])
        self.tokens = [token for token, _ in offline(tiny_nemotron(), mel, LOOKAHEAD)]

    async def run(
        self, sequence: AsyncSequence, turn: int, draw: random.Random, heard: list[int]
    ) -> int:
        await asyncio.sleep(draw.uniform(0.0, 0.5))
        outputs = await sequence.step(
            {"audio": self.parts[turn]},
            end=turn == TURNS - 1,
            parameters={"sample_rate": SAMPLE_RATE},
        )
        tokens = outputs["tokens"].reshape(-1).tolist()
        check(f"rnnt {self.seed}", turn, tokens, self.tokens[len(heard) : len(heard) + len(tokens)])
        heard += tokens
        if turn == TURNS - 1:
            check(f"rnnt {self.seed}", turn, heard, self.tokens)
        return len(tokens)


def scripts(count: int) -> dict[str, list[Any]]:
    """So many scripts of each kind of state, with what is expected."""
    made: dict[str, list[Any]] = {
        kind: [Chat(kind, seed) for seed in range(count)] for kind in DECODERS
    }
    made["whisper"] = [Windows(seed) for seed in range(count)]
    made["rnnt"] = [Speech(seed + 1) for seed in range(count)]
    for script in all_of(made.values()):
        script.prepare()
    return made


def all_of(groups: Iterable[list[Any]]) -> Iterable[Any]:
    return (script for group in groups for script in group)
