"""The transducer of the examples in eager PyTorch: the usual greedy search, frame by frame."""

import torch
from inplace.drivers import StepDriver
from inplace.errors import RequestError
from inplace.runtime.requests import Request
from torch import Tensor
from transducer import BLANK, FEATURES, FRAMES, MAX_SYMBOLS, Decode, Encode


class GreedySearch:
    """One stream, without buffers or schedules.

    Args:
        encode, decode: the modules, of which only the layers are used.
    """

    def __init__(self, encode: Encode, decode: Decode) -> None:
        self.encode, self.decode = encode, decode
        self.context = torch.zeros(1, 1, encode.gru.hidden_size)
        self.hidden = torch.zeros(1, encode.gru.hidden_size)
        self.last = torch.tensor([BLANK])

    @torch.no_grad()
    def feed(self, features: Tensor) -> list[int]:
        """The tokens of one more chunk, ``[FRAMES, FEATURES]``."""
        encoded, self.context = self.encode.gru(features[None], self.context)
        tokens = []
        for frame in encoded[0]:
            for _ in range(MAX_SYMBOLS):
                hidden = self.decode.cell(self.decode.embedding(self.last), self.hidden)
                scores = self.decode.joint(torch.cat([frame[None], hidden], 1))
                token = int(scores.argmax())
                if token == BLANK:
                    break
                tokens.append(token)
                self.hidden, self.last = hidden, torch.tensor([token])
        return tokens


def chunks(stream: int, count: int) -> list[Tensor]:
    """Features of so many chunks, different for each stream."""
    generator = torch.Generator().manual_seed(stream)
    return list(2 * torch.randn(count, FRAMES, FEATURES, generator=generator))


def check_streams(driver: StepDriver, parts: tuple[Encode, Decode], count: int) -> set[int]:
    """Feed three streams so many chunks, in one call each; returns the tokens that there were."""
    streams = [chunks(stream, count) for stream in range(3)]
    searches, seen = [GreedySearch(*parts) for _ in streams], set[int]()
    for place in range(count):
        answers = driver.run(
            [
                Request(number + 1, place == 0, False, {"features": stream[place][None]})
                for number, stream in enumerate(streams)
            ]
        )
        for search, stream, answer in zip(searches, streams, answers, strict=True):
            assert not isinstance(answer, RequestError), answer
            expected = search.feed(stream[place])
            assert answer["tokens"][0].tolist() == expected
            seen |= set(expected)
    return seen
