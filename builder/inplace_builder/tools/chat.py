"""A conversation with a served decoder: one sequence, to which each turn sends only what is new."""

import time
from collections.abc import Iterator
from pathlib import Path

from inplace.client import Sequence
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from inplace_builder.errors import BuildError

MARK = "\u241e"
"""Stands for a reply when the template is asked what comes after one; a character no template contains."""


class Conversation:
    """Turns of a chat over one sequence, greedy decoding.

    Args:
        sequence: a sequence of the served decoder.
        tokenizer: its tokenizer, with a chat template.
        system: the system message; the template's own if None.

    Attributes:
        steps: requests that produced a token, over all turns.
        seconds: time they took.
    """

    def __init__(
        self, sequence: Sequence, tokenizer: PreTrainedTokenizerFast, system: str | None = None
    ) -> None:
        if not tokenizer.chat_template:
            raise BuildError(
                "the tokenizer has no chat template; talk to this model with raw sequences"
            )
        self.sequence, self.tokenizer, self.system = sequence, tokenizer, system
        self.steps = 0
        self.seconds = 0.0
        self._stops = {
            tokenizer.eos_token_id,
            *self._after_reply([])[:1],
        }  # a tokenizer's own EOS need not be what ends a turn
        self._unsent: list[int] = []  # the last token said: the model has not been fed it yet

    def say(self, text: str, max_tokens: int = 128) -> Iterator[str]:
        """Send a user's turn and yield the reply piece by piece as it is generated."""
        ids = self._unsent + self._turn(text)
        if (
            self._unsent and ids[1:2] == self._unsent
        ):  # the reply ended with the token that the template now repeats
            ids = ids[1:]
        stream = DecodeStream(skip_special_tokens=True)
        for _ in range(max_tokens):
            begin = time.monotonic()
            token = self.sequence.tokens(ids)
            self.seconds += time.monotonic() - begin
            self.steps += 1
            ids = [token]
            if token in self._stops:
                break
            if piece := stream.step(self.tokenizer.backend_tokenizer, token):
                yield piece
        self._unsent = ids

    def _turn(self, text: str) -> list[int]:
        """The token ids of a user's turn: the whole prompt at first, later what the template puts after the last reply."""
        turn = [{"role": "user", "content": text}]
        if self.sequence.length:
            return self._after_reply(turn)
        system = [{"role": "system", "content": self.system}] if self.system else []
        return self._ids(
            str(
                self.tokenizer.apply_chat_template(
                    system + turn, tokenize=False, add_generation_prompt=True
                )
            )
        )

    def _after_reply(self, turn: list[dict[str, str]]) -> list[int]:
        """What the template puts after a reply, up to where the next one begins if a turn follows."""
        history = [{"role": "user", "content": "-"}, {"role": "assistant", "content": MARK}]
        rendered = self.tokenizer.apply_chat_template(
            history + turn, tokenize=False, add_generation_prompt=bool(turn)
        )
        return self._ids(str(rendered).partition(MARK)[2])

    def _ids(self, rendered: str) -> list[int]:
        ids: list[int] = self.tokenizer(rendered, add_special_tokens=False)["input_ids"]
        return ids


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer that a build put beside the engine.

    Raises:
        BuildError: there is none.
    """
    if not folder.is_dir():
        raise BuildError(
            f"{folder} does not exist: the model was built without a tokenizer; talk to it with raw sequences"
        )
    tokenizer = AutoTokenizer.from_pretrained(
        folder, local_files_only=True, clean_up_tokenization_spaces=False
    )
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return tokenizer
