"""Talking to a served model: sequences over gRPC, with retries, and replay where a server is lost. asyncio: `inplace.client.aio`.

::

    with Client(["host-a:8001", "host-b:8001"]) as client, Sequence(client, "my-model") as sequence:
        token = sequence.tokens([1, 2, 3])  # a step: what is new; the next token
        for piece in sequence.generate([token], max_tokens=64):  # a stream model
            print(piece.text, end="")
"""

from inplace.client.base import Options
from inplace.client.client import Client
from inplace.client.errors import ClientError, RefusedError, SequenceLostError, UnreachableError
from inplace.client.progress import Piece
from inplace.client.retry import ONCE, Retry
from inplace.client.sequence import Generation, Sequence

__all__ = [
    "ONCE",
    "Client",
    "ClientError",
    "Generation",
    "Options",
    "Piece",
    "RefusedError",
    "Retry",
    "Sequence",
    "SequenceLostError",
    "UnreachableError",
]
