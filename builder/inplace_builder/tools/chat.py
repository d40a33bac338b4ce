"""A conversation with a served decoder: one sequence, to which each turn sends only what is new."""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from inplace.client import Sequence
from inplace.drivers.detokenizer import TOKENIZER_FOLDER
from inplace.schema.files import EngineFolder
from inplace.schema.served import Manifest
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from inplace_builder.errors import BuildError, brief
from inplace_builder.served.model_config import MODEL_VERSION

REPLY_PLACEHOLDER = "\u241e"
"""The reply in the chat that is rendered to see what the template puts after one; no template
contains this character."""


class Conversation:
    """The turns of a chat over one sequence, with greedy decoding.

    Args:
        sequence: a sequence of the served decoder.
        tokenizer: the decoder's tokenizer, with a chat template.
        system: the system message; the template's own if None.

    Attributes:
        steps: number of requests that returned a token, over all turns.
        seconds: time that they took.

    Raises:
        BuildError: the tokenizer has no chat template, or one that cannot be rendered.
    """

    def __init__(
        self, sequence: Sequence, tokenizer: PreTrainedTokenizerFast, system: str | None = None
    ) -> None:
        if not tokenizer.chat_template:
            raise BuildError(
                "the tokenizer has no chat template; send token ids to this model instead"
            )
        self.sequence, self.tokenizer, self.system = sequence, tokenizer, system
        self.steps = 0
        self.seconds = 0.0
        # a tokenizer's EOS token is not always the one that ends a turn
        self._stop_ids = {tokenizer.eos_token_id, *self._ids_after_reply([])[:1]}
        self._pending: list[int] = []  # the last token of the reply: not fed to the model yet

    def send(self, text: str, max_tokens: int = 128) -> Iterator[str]:
        """Send a user's turn and yield the reply piece by piece as it is generated."""
        ids = self._pending + self._turn_ids(text)
        if self._pending and ids[1:2] == self._pending:
            ids = ids[1:]  # the template repeats the token that ended the reply
        stream = DecodeStream(skip_special_tokens=True)
        for _ in range(max_tokens):
            begin = time.monotonic()
            token = self.sequence.tokens(ids)
            self.seconds += time.monotonic() - begin
            self.steps += 1
            ids = [token]
            if token in self._stop_ids:
                break
            if piece := stream.step(self.tokenizer.backend_tokenizer, token):
                yield piece
        self._pending = ids

    def _turn_ids(self, text: str) -> list[int]:
        """The token ids of a user's turn: at first the whole prompt, later what follows a reply."""
        turn = [{"role": "user", "content": text}]
        if self.sequence.length:
            return self._ids_after_reply(turn)
        system = [{"role": "system", "content": self.system}] if self.system else []
        return self._ids(self._render(system + turn, add_generation_prompt=True))

    def _ids_after_reply(self, turn: list[dict[str, str]]) -> list[int]:
        """The token ids that the template puts after a reply, the next turn included."""
        history = [
            {"role": "user", "content": "-"},
            {"role": "assistant", "content": REPLY_PLACEHOLDER},
        ]
        rendered = self._render(history + turn, add_generation_prompt=bool(turn))
        return self._ids(rendered.partition(REPLY_PLACEHOLDER)[2])

    def _render(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        """The text of a chat. transformers renders templates in Jinja's sandbox.

        Raises:
            BuildError: the template fails, or does what the sandbox does not allow.
        """
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=add_generation_prompt
                )
            )
        except Exception as error:  # of any type: a template calls what it likes
            raise BuildError(
                f"the tokenizer's chat template cannot be rendered: {brief(error)}"
            ) from error

    def _ids(self, rendered: str) -> list[int]:
        ids: list[int] = self.tokenizer(rendered, add_special_tokens=False)["input_ids"]
        return ids


def load_chat_tokenizer(model: Path | str) -> PreTrainedTokenizerFast:
    """Load the tokenizer that a build saved with a model.

    Args:
        model: the model's folder in its repository.

    Raises:
        BuildError: there is none.
        LoadError: a file is not the one that the manifest lists.
    """
    folder = EngineFolder(Path(model) / MODEL_VERSION)
    manifest = Manifest.load(folder.path)
    records = [each for each in manifest.files if each.name.startswith(f"{TOKENIZER_FOLDER}/")]
    if not records:
        raise BuildError(
            f"{folder.path} has no tokenizer: the model was built without one; "
            "send token ids to it instead"
        )
    with tempfile.TemporaryDirectory(prefix="inplace-tokenizer-") as copy:
        # transformers reads a folder: give it one with the bytes that were checked.
        for record in records:
            path = Path(copy) / record.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(folder.read(record))
        tokenizer = AutoTokenizer.from_pretrained(
            Path(copy) / TOKENIZER_FOLDER,
            local_files_only=True,
            trust_remote_code=False,
            clean_up_tokenization_spaces=False,
        )
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return tokenizer
