"""The client for asyncio: the same sequences, retries and replay as `inplace.client`, over `tritonclient.grpc.aio`."""

from inplace.client.aio.client import Client
from inplace.client.aio.sequence import Generation, Sequence

__all__ = ["Client", "Generation", "Sequence"]
