"""Answers over HTTP that end when the client goes away: server-sent events, and whole ones."""

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from inplace.openai.errors import ApiError

Result = TypeVar("Result")

DONE = b"data: [DONE]\n\n"

HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}
"""No proxy may hold events back."""


def event(body: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


class EventStream(Response):
    """A response of server-sent events.

    An error behind the first event is the last event. A client that goes away cancels the rest.

    Args:
        events: an event at a time; closed in any case.
        first: the event that was waited for before the status was sent.
    """

    def __init__(self, events: AsyncIterator[bytes], first: bytes) -> None:
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self._events, self._first = events, first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        await until_disconnect(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )
        body = self._first
        try:
            while body:
                await send({"type": "http.response.body", "body": body, "more_body": True})
                body = await anext(self._events, b"")
        except ApiError as error:
            last = event(error.body)
            await send({"type": "http.response.body", "body": last, "more_body": True})
        finally:
            await self._events.aclose()  # type: ignore[attr-defined] # it is a generator
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result | None:
    """Run something for a client; where that goes away, cancel it and return None.

    Args:
        receive: of a request whose body was read.
        work: what to run.
    """
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
    finally:  # also where this task is cancelled
        gone = not task.done()
        for each in (task, watcher):
            each.cancel()
        await asyncio.wait({task, watcher})
    return None if gone else task.result()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
