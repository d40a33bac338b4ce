"""A run of the fuzzer against a server, and its judgement."""

import asyncio
import random
from pathlib import Path

import grpc
import numpy as np
import torch
from fuzz.actors import Findings, Lane, Server, Victim
from inplace.errors import RequestError
from inplace.instance import ModelInstance
from inplace.requests import Request
from models import open_instance

VICTIMS = {"llama": (10**6 + 1, "victim", 2**63 - 2, -5, "victim with a long name " * 5), "accumulator": (10**6 + 1, "victim")}
LANES = 24
SHARE = 0.4
"""Of the requests, what the victims send."""


def fuzz(url: str, repository: Path, requests: int, seed: int) -> Findings:
    """Fire so many requests at a server of ``repository``; the same seed sends the same requests, in another interleaving.

    What the victims were told is compared with what the same requests say alone, in this process.
    """
    findings = Findings()
    victims = [Victim(model, name, random.Random(f"{seed} {model} {name}")) for model, names in VICTIMS.items() for name in names]
    lanes = [Lane(random.Random(f"{seed} lane {number}")) for number in range(LANES)]
    asyncio.run(_fire(url, findings, victims, lanes, requests))
    for model in VICTIMS:
        instance = open_instance(repository / model)
        for victim in victims:
            if victim.model == model:
                _compare(instance, victim, findings)
    return findings


async def _fire(url: str, findings: Findings, victims: list[Victim], lanes: list[Lane], requests: int) -> None:
    async with grpc.aio.insecure_channel(url) as channel:
        server = Server(channel, findings)
        each, every = int(requests * SHARE / len(victims)), -(-int(requests * (1 - SHARE)) // len(lanes))
        await asyncio.gather(*(victim.run(server, each) for victim in victims), *(lane.run(server, every) for lane in lanes))


def _compare(instance: ModelInstance, victim: Victim, findings: Findings) -> None:
    """Repeat what a victim was answered, alone: tokens and sums bit for bit, scores within 1e-4."""
    for number, done in enumerate(victim.accepted):
        inputs = {name: torch.from_numpy(array.copy()) for name, array in done.tensors.items()}
        try:
            work = instance.admit(Request("alone", done.start, done.end, inputs, parameters=done.parameters))
        except RequestError as error:
            findings.wrong.append(f"{victim.model} {victim.id!r}, answer {number}: {done} was answered; alone it is refused: {error}")
            return
        while not work.finished:
            instance.step([work])
        instance.finish(work)
        for name, said in done.answer.items():
            alone = work.outputs[name].numpy()
            if not (np.allclose(alone, said, rtol=1e-4, atol=1e-4) if name == "logits" else np.array_equal(alone, said)):
                findings.wrong.append(f"{victim.model} {victim.id!r}, answer {number}: {name} is {said}, alone {alone}")
                return
