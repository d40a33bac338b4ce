"""What every request passes: its Host, its key, the key's limits; and what is counted of it."""

import contextlib
import logging
import secrets
import time
from collections.abc import Collection
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from inplace.openai.errors import ApiError
from inplace.openai.keys import Keys, Use, sequence_key
from inplace.openai.limits import Limits
from inplace.openai.metrics import Metrics
from inplace.openai.workers import Sum

log = logging.getLogger("inplace.openai")

OPEN = ("/", "/health")
"""Paths that need no key: the page, which asks for one, and probes."""

METRICS = "/metrics"

LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")
"""What a client on the same machine calls it."""


def error_response(error: ApiError) -> JSONResponse:
    """The answer for an error."""
    return JSONResponse(error.body, error.status, headers=error.headers)


class Gate:
    """The outermost part of the application.

    Without keys it answers only requests to a host of its own, so that no page of another site
    reaches it through a name that resolves to this machine.

    Args:
        app: what is inside.
        keys: the keys; None lets everyone in.
        limits: of all requests.
        metrics: where requests are counted.
        in_flight: requests that run, in all processes.
        hosts: names of this server beside those of the loopback interface.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Keys | None,
        limits: Limits,
        metrics: Metrics,
        in_flight: Sum,
        hosts: Collection[str] = (),
    ) -> None:
        self._app, self._keys, self._limits, self._metrics = app, keys, limits, metrics
        self._in_flight = in_flight
        self._hosts = {*LOOPBACK_HOSTS, *hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(send)
        state: dict[str, Any] = scope.setdefault("state", {})
        state |= {"request_id": answer.request_id, "begin": answer.begin, "use": None}
        state["sequence_key"] = None
        self._in_flight.add(1)
        try:
            with contextlib.ExitStack() as stack:
                try:
                    self._check_host(scope)
                    use, state["sequence_key"] = self._authenticate(scope)
                    state["use"] = use
                    self._check_room()
                    if use is not None and scope["method"] == "POST":
                        stack.enter_context(use.request())
                except ApiError as error:
                    await error_response(error)(scope, receive, answer.send)
                    return
                await self._app(scope, receive, answer.send)
        finally:
            self._in_flight.add(-1)
            seconds = time.monotonic() - answer.begin
            # a path that is not a route is whatever a client sent
            route = _route(scope)
            self._metrics.answered(route, answer.status, seconds)
            log.info(
                "%s %s %s %d %.3f s",
                answer.request_id,
                scope["method"],
                route,
                answer.status,
                seconds,
            )

    def _check_host(self, scope: Scope) -> None:
        host = Headers(scope=scope).get("host", "")
        name = host.rpartition(":")[0] if host.rpartition("]")[2].count(":") else host
        if self._keys is None and name.strip("[]").lower() not in self._hosts:
            raise ApiError(
                421,
                "the header Host does not name this server; `inplace openai --allow-host` adds a "
                "name",
                code="wrong_host",
            )

    def _authenticate(self, scope: Scope) -> tuple[Use | None, str | None]:
        """The use of the request's key, and the key of its sequences."""
        if self._keys is None or scope["path"] in OPEN:
            return None, None
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        use = self._keys.find(key.strip()) if scheme.lower() == "bearer" else None
        if use is None:
            raise ApiError(
                401,
                "the API key is missing or wrong: send the header 'Authorization: Bearer <key>'",
                code="invalid_api_key",
            )
        if scope["path"] == METRICS and not use.record.metrics:
            raise ApiError(403, "this key may not read metrics", code="forbidden")
        return use, sequence_key(key.strip())

    def _check_room(self) -> None:
        if self._in_flight.total > self._limits.requests:
            raise ApiError(
                503,
                f"{self._limits.requests} requests are in flight already",
                code="server_full",
                retry_after=1,
            )


def _route(scope: Scope) -> str:
    """What a request asked for, as one of few names."""
    if scope.get("path_params"):
        return "/v1/models/{model}"
    return scope["path"] if "endpoint" in scope else "other"


class _Answer:
    """The answer as it is sent: its status, and the header with the request's id."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.request_id = secrets.token_hex(12)
        self.begin = time.monotonic()
        self.status = 499  # the client went away before the answer

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)["x-request-id"] = self.request_id
        await self._send(message)
