"""A language model's tokenizer, incremental detokenization, and stop texts."""

import codecs
import re
from collections.abc import Collection
from copy import copy
from itertools import islice

from tokenizers import Tokenizer

from inplace.errors import InplaceError, LoadError
from inplace.schema.files import EngineFolder
from inplace.schema.served import Manifest

TOKENIZER_FOLDER = "tokenizer"
"""The folder of a tokenizer in an engine folder."""

TOKENIZER_NAME = f"{TOKENIZER_FOLDER}/tokenizer.json"
"""The file of it that the server reads."""


CONTEXT_TOKENS = 16
"""Tokens of the prompt that a detokenizer keeps, because its first characters depend on them."""

MAX_CONTEXT = 4 * CONTEXT_TOKENS
"""Tokens of a text that are kept for a later detokenizer: some of them may be special ones."""

MAX_WINDOW_TOKENS = 32
"""Length at which the window of decoded tokens is cut."""

MAX_CHARACTER_TOKENS = 4
"""Tokens that one character takes at most: one for each byte of its UTF-8."""

MAX_INVALID_TOKENS = 64
"""Length at which a run of tokens that are not characters is shortened in the window."""

INVALID_CONTEXT = 2 * MAX_CHARACTER_TOKENS
"""Tokens of such a run that stay at each of its ends."""

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
"""How tokenizers with byte fallback spell a token that is one byte."""


class TokenizerError(InplaceError):
    """The tokenizer's library failed on a text or on tokens."""


def encode(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
    """The token ids of a text.

    Raises:
        TokenizerError: the library failed. Its panics are no `Exception`: they would end the thread
            that they reach.
    """
    try:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise TokenizerError(f"the tokenizer failed on the text: {error}") from error
    return ids


def decode(tokenizer: Tokenizer, tokens: list[int]) -> str:
    """The text of tokens, without special ones; the same error."""
    try:
        text: str = tokenizer.decode(tokens, skip_special_tokens=True)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise TokenizerError(f"the tokenizer failed on generated tokens: {error}") from error
    return text


def load_tokenizer(folder: EngineFolder, manifest: Manifest) -> Tokenizer | None:
    """Load the tokenizer that the builder put beside the engine; None if there is none.

    Raises:
        LoadError: it cannot be read, is not the one that the manifest lists, or there is one
            although the manifest lists none.
    """
    path = folder.path / TOKENIZER_NAME
    if not manifest.has_file(TOKENIZER_NAME):
        if path.exists():
            raise LoadError(
                f"{path} is not a file of this engine: its manifest lists no tokenizer; remove it, "
                "or build the model again with the tokenizer beside the weights"
            )
        return None
    content = folder.read(manifest.file(TOKENIZER_NAME))
    try:
        tokenizer: Tokenizer = Tokenizer.from_buffer(bytes(content))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises Exception itself, and panics
        raise LoadError(
            f"{path} cannot be read as a tokenizer ({error}); build the model again"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """The ids of the special tokens by their text. Decoding leaves them out."""
    return {
        token.content: token_id
        for token_id, token in tokenizer.get_added_tokens_decoder().items()
        if token.special
    }


class Detokenizer:
    """The text that tokens add to the tokens before them, in whole characters.

    The last tokens are decoded again with every new one: the text of a token depends on its
    neighbours, and a character may take several tokens. The window is cut only where its text is
    whole, because a tokenizer with byte fallback decodes a run of bytes that begins inside a
    character to replacement characters alone. Special tokens add no text and are left out, so that
    the window never consists of them: a decoder may strip the space that a text begins with.

    The pieces and `flush` together are the text of all tokens behind that of the prompt, however
    the tokens are grouped. One exception: where an invalid byte follows complete characters in a
    run of byte-fallback tokens, the decoder takes these characters back; a piece that was returned
    keeps them.

    ``tokenizers.decoders.DecodeStream`` (0.23) cannot be used instead: it raises in that case, and
    it has no way to return an incomplete end.

    Args:
        tokenizer: the model's.
        prompt: the tokens before.
        special: the ids of its special tokens.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], special: Collection[int]) -> None:
        self._tokenizer, self._special = tokenizer, special
        last = (token for token in reversed(prompt) if token not in special)
        context = list(islice(last, CONTEXT_TOKENS))[::-1]
        self._window = context[self._first_whole(context) :]
        self._prompt_text = self._decode(self._window)
        # The end of the window's longest part whose text is whole, and the length of that text.
        self._whole, self._num_returned = self._whole_part()
        self._num_dropped = 0  # replacement characters of the run that is not returned yet

    def copy(self) -> "Detokenizer":
        """One that goes on by itself from the same tokens."""
        copied = copy(self)  # what is changed in place is copied too
        copied._window = self._window.copy()
        return copied

    def after(self, prompt: list[int]) -> "Detokenizer":
        """A new one of the same tokenizer, for tokens behind this prompt."""
        return Detokenizer(self._tokenizer, prompt, self._special)

    @property
    def context(self) -> list[int]:
        """The last tokens, from which another one can go on."""
        return self._window.copy()

    def append(self, tokens: list[int]) -> str:
        """Add tokens and return the text they add, without a last character that is incomplete."""
        self._window += [token for token in tokens if token not in self._special]
        text = self._decode(self._window)
        end = len(text.rstrip(REPLACEMENT))  # bytes that are not a character, or not yet
        piece = self._return(text, end)
        if end == len(text):
            if len(self._window) > MAX_WINDOW_TOKENS and self._whole:
                self._window = self._window[self._whole :]
                self._num_returned = len(self._decode(self._window))
                self._prompt_text = ""
            self._whole = len(self._window)
        elif len(self._window) - self._whole > MAX_INVALID_TOKENS:
            self._shorten_run(text)
        return piece

    def flush(self) -> str:
        """Return what is left: the replacement characters of an incomplete end."""
        text = self._decode(self._window)
        return self._return(text, len(text))

    def _return(self, text: str, end: int) -> str:
        """The characters up to ``end`` that have not been returned and are not the prompt's."""
        if end <= self._num_returned:
            return ""
        # A prompt may end in a replacement character of its own; then it is not added again.
        prompt, start = self._prompt_text, self._num_returned
        while start < min(end, len(prompt)) and prompt[start] == text[start]:
            start += 1
        self._num_returned = end
        dropped, self._num_dropped = self._num_dropped, 0
        return REPLACEMENT * dropped + text[start:end]

    def _shorten_run(self, text: str) -> None:
        """Drop tokens from the middle of a run of invalid bytes at the end of the window.

        Otherwise every new token would decode the whole run again. It is done only where no bytes
        that may follow can make characters of what the run begins with.
        """
        num_invalid = len(text) - len(text.rstrip(REPLACEMENT))
        start = max(self._whole, len(self._window) - num_invalid)
        head = self._window[: start + INVALID_CONTEXT]
        if not self._is_invalid(head[start:]):
            return
        window = head + self._window[-INVALID_CONTEXT:]
        shorter = self._decode(window)
        num_dropped = len(text) - len(shorter)
        if num_dropped > 0 and text == shorter + REPLACEMENT * num_dropped:
            self._window = window
            self._num_dropped += num_dropped

    def _is_invalid(self, tokens: list[int]) -> bool:
        """Whether the text of these tokens stays invalid, whatever follows them.

        Where tokens are bytes, one invalid sequence makes a run of them invalid as a whole.
        """
        matches = [BYTE_TOKEN.fullmatch(self._tokenizer.id_to_token(each) or "") for each in tokens]
        content = bytes(int(match[1], 16) for match in matches if match is not None)
        if len(content) < len(tokens):
            return True  # other tokenizers decode every sequence of bytes by itself
        try:
            codecs.getincrementaldecoder("utf-8")().decode(content)
        except UnicodeDecodeError:
            return True
        return False

    def _first_whole(self, prompt: list[int]) -> int:
        """Where a window at the end of the prompt can begin without cutting a character."""
        start = max(0, len(prompt) - CONTEXT_TOKENS // 2)
        while start and self._is_continuation_byte(prompt[start]):
            start -= 1
        return start

    def _is_continuation_byte(self, token: int) -> bool:
        match = BYTE_TOKEN.fullmatch(self._tokenizer.id_to_token(token) or "")
        return match is not None and 0x80 <= int(match[1], 16) < 0xC0

    def _whole_part(self) -> tuple[int, int]:
        """The number of tokens at the window's start whose text is whole, and that text's length.

        A prompt may end inside a character: a token or more then belongs to the character that the
        first new token completes.
        """
        length = len(self._window)
        for end in range(length, max(-1, length - MAX_CHARACTER_TOKENS), -1):
            text = self._decode(self._window[:end])
            if not text.endswith(REPLACEMENT):
                return end, len(text)
        return length, len(self._prompt_text)

    def _decode(self, tokens: list[int]) -> str:
        return decode(self._tokenizer, tokens)


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
