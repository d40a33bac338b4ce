"""Streams of a decoder over sequence requests, as the server tests drive them."""

import random
import time

from inplace.client import Sequence
from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

from support.models import VOCABULARY


def prompt(seed: int, tokens: int) -> list[int]:
    return random.Random(seed).choices(range(VOCABULARY), k=tokens)


def generate(sequence: Sequence, ids: list[int], tokens: int) -> list[int]:
    """Greedy decoding by steps: the prompt, then each generated token."""
    generated = [sequence.tokens(ids)]
    while len(generated) < tokens:
        generated.append(sequence.tokens(generated[-1:]))
    return generated


def split(ids: list[int], rng: random.Random) -> list[list[int]]:
    """The same tokens in parts of random length."""
    parts = []
    while ids:
        cut = rng.randint(1, len(ids))
        parts.append(ids[:cut])
        ids = ids[cut:]
    return parts


def batch_counts(client: InferenceServerClient, model: str) -> dict[int, int]:
    """How many batches of each size the server has executed."""
    statistics = client.get_inference_statistics(model).model_stats[0]
    return {entry.batch_size: entry.compute_infer.count for entry in statistics.batch_stats}


def retried(sequence: Sequence, ids: list[int]) -> int:
    """The first step, repeated while every slot is taken."""
    for _ in range(400):
        try:
            return sequence.tokens(ids)
        except InferenceServerException as error:
            if "INPLACE-NO_FREE_SLOT retryable=1" not in error.message():
                raise
            time.sleep(0.01)
    raise AssertionError("no slot came free")
