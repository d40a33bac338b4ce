"""A language model's tokenizer, incremental detokenization, and stop texts."""

from pathlib import Path

from tokenizers import Tokenizer

from inplace.errors import LoadError

TOKENIZER_FOLDER, TOKENIZER_FILE = "tokenizer", "tokenizer.json"


CONTEXT_TOKENS, MAX_WINDOW_TOKENS = 8, 32
"""Tokens before a text that its first characters may depend on; and the length at which the window
of decoded tokens is cut down to as many."""


REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """Load the tokenizer that the builder put beside the engine; None if there is none.

    Raises:
        LoadError: it cannot be read.
    """
    path = folder / TOKENIZER_FOLDER / TOKENIZER_FILE
    if not path.is_file():
        return None
    try:
        tokenizer: Tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises Exception itself
        raise LoadError(
            f"{path} cannot be read as a tokenizer ({error}); build the model again"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


class Detokenizer:
    """The text that tokens add to the tokens before them, in whole characters.

    The last tokens are decoded again with every new one: the text of a token depends on its
    neighbours, and a character may take several tokens. Special tokens add no text.

    Args:
        tokenizer: the model's.
        context: the tokens before.
    """

    def __init__(self, tokenizer: Tokenizer, context: list[int]) -> None:
        self._tokenizer = tokenizer
        self._window = context[-CONTEXT_TOKENS:]
        self._num_returned = len(self._decode())  # characters of the window's text

    def append(self, tokens: list[int]) -> str:
        """Add tokens and return the text they add, without a last character that is incomplete."""
        self._window += tokens
        text = self._decode()
        end = len(text.rstrip(REPLACEMENT))  # bytes that are not a character, or not yet
        piece = text[self._num_returned : end]
        self._num_returned = max(self._num_returned, end)
        if end == len(text) and len(self._window) > MAX_WINDOW_TOKENS:
            self._window = self._window[-CONTEXT_TOKENS:]
            self._num_returned = len(self._decode())
        return piece

    def _decode(self) -> str:
        text: str = self._tokenizer.decode(self._window, skip_special_tokens=True)
        return text


class StopMatcher:
    """Searches a text that arrives in pieces for stop texts.

    Args:
        stop: the stop texts, none of them empty.

    Attributes:
        matched: a stop text was found.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = stop
        self._held_back = ""
        self.matched = False

    def append(self, piece: str) -> str:
        """Add a piece and return the text that can be sent.

        It ends before the first stop text. Characters that may begin a stop text are held back.
        """
        self._held_back += piece
        places = [place for text in self._stop if (place := self._held_back.find(text)) >= 0]
        if places:
            self.matched = True
            end, rest = min(places), ""
        else:
            end = len(self._held_back) - max(self._num_matching(text) for text in self._stop)
            rest = self._held_back[end:]
        sendable, self._held_back = self._held_back[:end], rest
        return sendable

    def flush(self) -> str:
        """Return the text held back; no more pieces follow."""
        rest, self._held_back = self._held_back, ""
        return rest

    def _num_matching(self, text: str) -> int:
        """How many characters at the end of the text held back begin this stop text."""
        longest = min(len(text) - 1, len(self._held_back))
        sizes = (n for n in range(longest, 0, -1) if self._held_back.endswith(text[:n]))
        return next(sizes, 0)
