"""A run of the fuzzer against a server, and its judgement."""

import asyncio
import random
from collections.abc import Mapping
from pathlib import Path

import grpc
import httpx
import numpy as np
import torch
from fuzz.actors import Accepted, Lane, Surfer, Victim
from fuzz.answers import Findings, Results, Streamed, Unary
from fuzz.web import Web
from inplace.errors import RequestError
from inplace.parameters import Parameter, RequestKind, known_names
from inplace.runtime.instance import ModelInstance
from inplace.runtime.requests import Request
from inplace_builder.tools.tritonserver import TritonServer
from support.models import open_instance

VICTIMS = {
    "llama": (10**6 + 1, "victim", 2**63 - 2, -5, "victim with a long name " * 5),
    "stream": (10**6 + 1, "victim", 2**63 - 2, -5),
    "accumulator": (10**6 + 1, "victim"),
}
UNARY, STREAMS = (
    ("llama", "llama", "llama", "accumulator", "stream"),
    ("stream", "stream", "stream", "stream", "llama"),
)
"""Models that lanes send to, by unary gRPC and over streams; sometimes by the wrong one."""
LANES = {UNARY: 14, STREAMS: 10}
WHOLE = [("grpc.max_metadata_size", 1 << 20)]
"""Of a channel. gRPC sends an error's text as a header, and a client drops more than 8 KB:
Triton's errors repeat what was sent."""
SURFERS = 6
SHARE = 0.4
"""Of the requests, what the victims send."""


def fuzz(server: TritonServer, repository: Path, requests: int, seed: int) -> Findings:
    """Send so many requests to a server of ``repository``.

    The same seed sends the same requests, in another interleaving.

    The victims' results are compared with those of the same requests alone, in this process.
    """
    findings = Findings()
    victims = [
        Victim(model, name, random.Random(f"{seed} {model} {name}"))
        for model, names in VICTIMS.items()
        for name in names
    ]
    lanes = [
        Lane(models, random.Random(f"{seed} {models} {number}"))
        for models, count in LANES.items()
        for number in range(count)
    ]
    surfers = [Surfer(random.Random(f"{seed} surfer {number}")) for number in range(SURFERS)]
    asyncio.run(_fire(server, findings, victims, lanes, surfers, requests))
    for model in VICTIMS:
        instance = open_instance(repository / model)
        for victim in victims:
            if victim.model == model:
                _compare(instance, victim, findings)
    return findings


async def _fire(
    server: TritonServer,
    findings: Findings,
    victims: list[Victim],
    lanes: list[Lane],
    surfers: list[Surfer],
    requests: int,
) -> None:
    async with (
        grpc.aio.insecure_channel(server.grpc_url, WHOLE) as channel,
        httpx.AsyncClient(timeout=None) as client,
    ):
        web = Web(f"{server.host}:{server.ports.http}", client, findings)
        unary = Unary(channel, findings)
        streams = [Streamed(channel, findings) for _ in range(len(victims) + len(lanes))]
        each, every = (
            int(requests * SHARE / len(victims)),
            -(-int(requests * (1 - SHARE)) // (len(lanes) + len(surfers))),
        )
        await asyncio.gather(
            *(
                victim.run(streams.pop() if victim.model == "stream" else unary, each)
                for victim in victims
            ),
            *(
                lane.run(streams.pop() if lane.models is STREAMS else unary, every)
                for lane in lanes
            ),
            *(surfer.run(web, every) for surfer in surfers),
        )


def _compare(instance: ModelInstance, victim: Victim, findings: Findings) -> None:
    """Repeat what a victim was answered, alone: tokens and sums bit for bit, scores within 1e-4."""
    pending: list[int] = []
    for number, done in enumerate(victim.accepted):
        pending = [] if done.start else pending
        try:
            alone = _alone(instance, done, pending)
        except RequestError as error:
            findings.wrong.append(
                f"{victim.model} {victim.id!r}, answer {number}: {done} was answered; "
                f"alone it is refused: {error}"
            )
            return
        pending = alone["tokens"][0, -1:].tolist() if "tokens" in alone else []
        for name, generated in done.answer.items():
            if name in ("finish_reason", "text_output"):
                continue
            if not (
                np.allclose(alone[name], generated, rtol=1e-4, atol=1e-4)
                if name == "logits"
                else np.array_equal(alone[name], generated)
            ):
                findings.wrong.append(
                    f"{victim.model} {victim.id!r}, answer {number}: {name} is {generated}, "
                    f"alone {alone[name]}"
                )
                return


def _alone(instance: ModelInstance, done: Accepted, pending: list[int]) -> Results:
    """A request's results alone; a generation is steps, its last token fed with the next one."""
    inputs = {name: torch.from_numpy(array.copy()) for name, array in done.tensors.items()}
    if pending:
        inputs["input_ids"] = torch.cat([torch.tensor([pending]), inputs["input_ids"]], dim=1)
    parameters = {
        name: value
        for name, value in done.parameters.items()
        if name != "position" and name in known_names(RequestKind.STEP)
    }
    most, reused = done.parameters.get("max_tokens"), {"reused_tokens": np.array([[0]])}
    if most is None:
        return _step(instance, done.start, done.end, inputs, parameters) | reused
    generated: list[int] = []
    for count in range(int(most)):
        start, end = done.start and count == 0, done.end and count == int(most) - 1
        generated.append(_step(instance, start, end, inputs, parameters)["next_token"].item())
        inputs = {"input_ids": torch.tensor([generated[-1:]])}
    return {"tokens": np.array([generated])} | reused


def _step(
    instance: ModelInstance,
    start: bool,
    end: bool,
    inputs: Mapping[str, torch.Tensor],
    parameters: Mapping[str, Parameter],
) -> Results:
    outputs = frozenset(spec.name for spec in instance.program.outputs)
    active = instance.admit(
        Request("alone", start, end, inputs, parameters=parameters, requested_outputs=outputs)
    )
    while not active.finished:
        instance.step([active])
    instance.finish(active)
    return {name: tensor.numpy() for name, tensor in active.outputs.items()}
