"""A router as `deploy/kubernetes/envoy.yaml` describes one: each gRPC call goes to the server that the hash of its metadata names."""

import contextlib
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from types import TracebackType
from typing import Any, Self

import grpc

HEADER = "inplace-sequence"


class Router(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc is untyped
    """Passes calls on as they are, streams too. A call without the header goes to each server in turn.

    Args:
        urls: ``host:port`` of the servers.
    """

    def __init__(self, urls: list[str]) -> None:
        self._channels = [grpc.insecure_channel(url) for url in urls]
        self._turn = count()
        self.routed: dict[str, Counter[int]] = {}
        self._server = grpc.server(ThreadPoolExecutor(32), handlers=[self])
        self.url = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def service(self, handler_call_details: Any) -> Any:
        named = dict(handler_call_details.invocation_metadata).get(HEADER)
        index = (
            zlib.crc32(named.encode()) % len(self._channels)
            if named is not None
            else next(self._turn) % len(self._channels)
        )
        if named is not None:
            self.routed.setdefault(named, Counter())[index] += 1
        forward = self._channels[index].stream_stream(handler_call_details.method)

        def passed(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            call = forward(requests)
            context.add_callback(call.cancel)
            try:
                yield from call
            except grpc.RpcError as error:
                context.abort(error.code(), error.details())

        return grpc.stream_stream_rpc_method_handler(passed)

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.stop(grace=1).wait()
        with contextlib.suppress(Exception):
            for channel in self._channels:
                channel.close()
