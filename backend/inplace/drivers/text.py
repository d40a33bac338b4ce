"""Text in and out of a language model: a tokenizer, tokens back into text as they come, and texts that end a generation."""

from pathlib import Path

from tokenizers import Tokenizer

from inplace.errors import LoadError

TOKENIZER_FOLDER, TOKENIZER_FILE = "tokenizer", "tokenizer.json"


CONTEXT, WINDOW = 8, 32
"""Tokens before a text that its first characters may depend on, and how many are kept before they are cut down to so many."""


REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer that the builder put beside the engine; None where there is none.

    Raises:
        LoadError: it cannot be read.
    """
    path = folder / TOKENIZER_FOLDER / TOKENIZER_FILE
    if not path.is_file():
        return None
    try:
        tokenizer: Tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library has no type of its own
        raise LoadError(
            f"{path} cannot be read as a tokenizer ({error}); build the model again"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


class Detokenizer:
    """The text that tokens add to those before them, in whole characters.

    A window of the last tokens is decoded again each time: what a token reads as depends on its neighbours, and a character may be spread
    over several tokens. Special tokens add nothing.

    Args:
        tokenizer: of the model.
        context: the tokens before.
    """

    def __init__(self, tokenizer: Tokenizer, context: list[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = context[-CONTEXT:]
        self._said = len(self._decoded())

    def add(self, tokens: list[int]) -> str:
        """The text that these tokens add; a character that is not complete yet comes with the token that completes it."""
        self._ids += tokens
        text = self._decoded()
        end = len(text.rstrip(REPLACEMENT))  # bytes that are no character, or not yet
        piece = text[self._said : end]
        self._said = max(self._said, end)
        if end == len(text) and len(self._ids) > WINDOW:
            self._ids = self._ids[-CONTEXT:]
            self._said = len(self._decoded())
        return piece

    def _decoded(self) -> str:
        text: str = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        return text


class StopMatcher:
    """Looks for texts that end a generation, across the pieces it comes in.

    Args:
        texts: what to look for, none of them empty.

    Attributes:
        hit: one of them was found.
    """

    def __init__(self, texts: tuple[str, ...]) -> None:
        self._texts = texts
        self._held = ""
        self.hit = False

    def add(self, piece: str) -> str:
        """What may be said of the text so far: it ends before the first stop text, and holds back what may become one."""
        self._held += piece
        found = [place for text in self._texts if (place := self._held.find(text)) >= 0]
        if found:
            self.hit = True
            said, self._held = self._held[: min(found)], ""
            return said
        keep = max(self._beginning(text) for text in self._texts)
        said, self._held = (
            self._held[: len(self._held) - keep],
            self._held[len(self._held) - keep :],
        )
        return said

    def rest(self) -> str:
        """What was held back and is not the beginning of a stop text after all."""
        said, self._held = self._held, ""
        return said

    def _beginning(self, text: str) -> int:
        """How many characters at the end of what is held begin this text."""
        return next(
            (
                size
                for size in range(min(len(text) - 1, len(self._held)), 0, -1)
                if self._held.endswith(text[:size])
            ),
            0,
        )
