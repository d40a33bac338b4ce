"""Requests over HTTP: JSON has other types and bytes than protobuf, and clients can leave."""

import asyncio
import json
import random
import re
from dataclasses import dataclass
from typing import Any

import httpx
from fuzz.answers import OURS, PATIENCE, Findings
from fuzz.damage import TEXTS
from inplace.errors import Code
from support.models import VOCABULARY

Json = Any
NUMBERS = (-1, 0, 1, 7, 2**31, 2**53 + 1, 2**63, 2**64, -(2**63) - 1, 0.5, -1e300)
VALUES: tuple[Json, ...] = (
    None,
    True,
    False,
    *NUMBERS,
    *TEXTS,
    [],
    {},
    [[]],
    [1, [2]],
    {"a": {"b": []}},
)
NAMES = (
    "id",
    "parameters",
    "inputs",
    "outputs",
    "text",
    "input_ids",
    "max_tokens",
    "stop",
    "temperature",
    "sequence_key",
    "position",
    "stream",
    "group",
    "stop_token_ids",
    "add_special_tokens",
    "prompt",
    "text_input",
    "temprature",
    "min_p",
    "sequence_id",
)
PYTHON = re.compile(r"Traceback|\w+Error\b|UnicodeDecode|unknown exception")
"""What no client should read."""
LONGEST = 2**59
"""Of a shape; see `fuzz.damage.other_shape`."""


@dataclass(frozen=True)
class Page:
    """What is sent."""

    path: str
    body: bytes


class Web:
    """The server as HTTP shows it; for any number of clients."""

    def __init__(self, url: str, client: httpx.AsyncClient, findings: Findings) -> None:
        self._url, self._client, self.findings = url, client, findings

    async def send(self, page: Page, leave_after: float | None = None) -> None:
        """Ask for a page, and judge what comes; or leave before it is whole."""
        try:
            async with asyncio.timeout(leave_after or PATIENCE):
                answer = await self._client.post(
                    f"http://{self._url}{page.path}", content=page.body
                )
        except TimeoutError:
            if leave_after is None:
                self._complain(f"no answer in {PATIENCE:.0f} s", page)
            else:
                self.findings.answers["left"] += 1
        except httpx.HTTPError as error:
            self._complain(f"the connection ended: {error!r}", page)
        else:
            self._judge(answer, page)

    def _judge(self, answer: httpx.Response, page: Page) -> None:
        text = answer.text
        errors = re.findall(r'"error":"((?:[^"\\]|\\.)*)"', text)
        if answer.status_code == 200 and not errors:
            self.findings.answers["page"] += 1
            return
        if errors == [
            ""
        ]:  # all that Triton answers where it cancels a request with another of its sequence
            self.findings.answers["cancelled with its sequence"] += 1
            return
        generated = errors[0] if errors else text
        ours = OURS.search(generated)
        if ours is not None and ours[1] in Code.__members__ and ours[1] != Code.ENGINE_FAILED:
            self.findings.answers[f"page {ours[1]}"] += 1
        elif ours is None and len(generated) > 10 and not PYTHON.search(generated):
            self.findings.answers["page refused by triton"] += 1
            self.findings.triton_messages.setdefault(
                f"HTTP {answer.status_code} {re.sub(r'[^A-Za-z ]+', ' ', generated)[:30]}",
                generated[:160],
            )
        else:
            self._complain(
                f"neither a page nor a clear error: {answer.status_code} {generated[:400]!r}", page
            )

    def _complain(self, what: str, page: Page) -> None:
        self.findings.wrong.append(f"{what}\n  of {page.path}: {page.body[:800]!r}")


def page(rng: random.Random, ids: tuple[int | str, ...]) -> Page:
    """A step, or a generation through the proxy: good, or damaged in one to three places."""
    if rng.random() < 0.4:
        path, document = (
            f"/v2/models/{rng.choice((*['llama'] * 5, 'stream'))}/infer",
            _step(rng, ids),
        )
    else:
        path, document = (
            f"/v2/models/stream_generate/{rng.choice(('generate', *['generate_stream'] * 4))}",
            _generation(rng),
        )
    for _ in range(rng.choice((0, 0, 0, 1, 1, 2))):
        document = _mutated(document, rng)
    body = json.dumps(document).encode() if _harmless(document) else b"{}"
    if rng.random() < 0.1:
        body = rng.choice(
            (
                body[: rng.randrange(len(body))],
                body + b"}",
                b"",
                body.replace(b": 1", b": 1e999"),
                b"\xff" + body,
            )
        )
    if rng.random() < 0.15:
        at = rng.choice([match.start() + 1 for match in re.finditer(rb'"', body)] or [0])
        body = (
            body[:at] + rng.choice((b"\xff", b"\xc3", b"\\ud800", b"\x00", b"\\u0000")) + body[at:]
        )
    return Page(path, body)


def _ids(rng: random.Random) -> list[int]:
    return [rng.randrange(VOCABULARY) for _ in range(rng.choice((1, 1, 2, 12)))]


def _step(rng: random.Random, ids: tuple[int | str, ...]) -> Json:
    tokens = _ids(rng)
    return {
        "id": rng.choice(("", "r1", "a" * 200)),
        "parameters": {
            "sequence_id": rng.choice(ids),
            "sequence_start": rng.random() < 0.5,
            "sequence_end": rng.random() < 0.5,
        },
        "inputs": [
            {"name": "input_ids", "shape": [1, len(tokens)], "datatype": "INT64", "data": tokens}
        ],
        "outputs": [{"name": "next_token"}],
    }


def _generation(rng: random.Random) -> Json:
    prompt = (
        {"text": rng.choice(("The licence", "x", "naïve ☃"))}
        if rng.random() < 0.5
        else {"input_ids": _ids(rng)}
    )
    more = (
        {"temperature": rng.choice((0.7, "0.7", 1)), "seed": rng.getrandbits(40)}
        if rng.random() < 0.4
        else {}
    )
    return {
        **prompt,
        **more,
        "max_tokens": rng.choice((1, 3, 20, 1000)),
        **rng.choice(({}, {"stream": True}, {"stream_interval": rng.choice((1, 4, 1000))})),
        **rng.choice(({}, {}, {"stop": ["</s>", "x"]}, {"stop_token_ids": "2,5"})),
    }


def _mutated(value: Json, rng: random.Random) -> Json:
    """The same with something in it replaced, added or left out."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        name = rng.choice(list(value))
        if rng.random() < 0.15:
            return {key: kept for key, kept in value.items() if key != name}
        if rng.random() < 0.15:
            return value | {rng.choice((*NAMES, *TEXTS)): rng.choice(VALUES)}
        return value | {name: _mutated(value[name], rng)}
    if isinstance(value, list) and value and rng.random() < 0.6:
        at = rng.randrange(len(value))
        return [*value[:at], _mutated(value[at], rng), *value[at + 1 :]]
    return rng.choice(VALUES)


def _harmless(document: Json) -> bool:
    """Whether no shape is one that ends tritonserver 2.51, see `fuzz.damage.other_shape`."""
    if isinstance(document, dict):
        shape = document.get("shape", [])
        numbers = (
            [extent for extent in shape if isinstance(extent, int)]
            if isinstance(shape, list)
            else []
        )
        return not (0 in numbers[:1] or any(abs(extent) >= LONGEST for extent in numbers)) and all(
            map(_harmless, document.values())
        )
    return not isinstance(document, list) or all(map(_harmless, document))
