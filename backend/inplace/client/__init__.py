"""A client of served models: sequences and generations over gRPC, with retries and replay.

::

    with Client(["host-a:8001", "host-b:8001"]) as client, Sequence(client, "my-model") as sequence:
        token = sequence.tokens([1, 2, 3])  # one step: the prompt in, the next token out
        for piece in sequence.generate([token], max_tokens=64):  # a model served as a stream
            print(piece.text, end="")

`AsyncClient`, `AsyncSequence` and `AsyncGeneration` are the same for asyncio.
"""

from inplace.client.async_client import AsyncClient, AsyncGeneration, AsyncSequence
from inplace.client.errors import ClientError, RefusedError, SequenceLostError, UnreachableError
from inplace.client.generation_progress import Piece
from inplace.client.logprobs import PromptLogprob, TokenLogprob, decode_prompt_logprobs
from inplace.client.requests import GenerationOptions
from inplace.client.servers import NO_RETRY, Retry
from inplace.client.sync_client import Client, Generation, Sequence

__all__ = [
    "NO_RETRY",
    "AsyncClient",
    "AsyncGeneration",
    "AsyncSequence",
    "Client",
    "ClientError",
    "Generation",
    "GenerationOptions",
    "Piece",
    "PromptLogprob",
    "RefusedError",
    "Retry",
    "Sequence",
    "SequenceLostError",
    "TokenLogprob",
    "UnreachableError",
    "decode_prompt_logprobs",
]
