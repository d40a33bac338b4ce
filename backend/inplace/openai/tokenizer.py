"""Texts to token ids and back: prompts, chats whose contents are not special tokens, single tokens.

A chat template writes special tokens and contents into one text. So that a content is never read as
a special token, its characters are marked before the template is rendered (`Marks`), and tokens
are looked for only where there are no marks.
"""

import json
import re
import secrets
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer

from inplace.drivers.detokenizer import (
    BYTE_TOKEN,
    Detokenizer,
    TokenizerError,
    decode,
    encode,
)
from inplace.drivers.parsing import first_tokens

MARKS = tuple(chr(code) for code in range(0xFDD0, 0xFDF0))
"""Characters that Unicode keeps free of any meaning. One that no content has is the mark."""

REASONING = ("<think>", "</think>")
"""Around reasoning in replies. Templates look for them, so they stay as they are in an assistant's
message, unless the tokenizer calls them special."""

WORD_START = "\N{LOWER ONE EIGHTH BLOCK}"
"""How SentencePiece writes a space."""


@dataclass(frozen=True)
class Marks:
    """Marks behind the characters of contents with which an added token may begin.

    Attributes:
        mark: the character.
        begins: matches the first character of any added token.
        kept: matches what is not marked in an assistant's message; None if nothing is kept.
    """

    mark: str
    begins: re.Pattern[str] | None
    kept: re.Pattern[str] | None

    def add(self, value: Any, *, reply: bool = False) -> Any:
        """A content, or any JSON value with contents, with marks.

        Args:
            value: what a client sent.
            reply: it is of an assistant's message.
        """
        if isinstance(value, str):
            return self._add_to_text(value, reply=reply)
        if isinstance(value, Mapping):
            return {
                self.add(key, reply=reply): self.add(one, reply=reply) for key, one in value.items()
            }
        if isinstance(value, Sequence):
            return [self.add(one, reply=reply) for one in value]
        return value

    def _add_to_text(self, text: str, *, reply: bool) -> str:
        if self.begins is None:
            return text
        if not reply or self.kept is None:
            return self.begins.sub(rf"\g<0>{self.mark}", text)
        parts = self.kept.split(text)  # kept parts have odd places
        return "".join(
            part if place % 2 else self.begins.sub(rf"\g<0>{self.mark}", part)
            for place, part in enumerate(parts)
        )

    def remove(self, text: str) -> str:
        """A text without marks."""
        return text.replace(self.mark, "")


class TextTokenizer:
    """The tokenizer of a served model.

    Args:
        tokenizer: as it was loaded.

    Attributes:
        added_tokens: the tokens that are not of the vocabulary of texts.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._first = first_tokens(tokenizer)
        added: dict[int, AddedToken] = tokenizer.get_added_tokens_decoder()
        self.added_tokens = frozenset(added)
        # runs of spaces are added tokens of some tokenizers and stand for nothing else
        self._added = {each.content: (i, each) for i, each in added.items() if each.content.strip()}
        longest = sorted(self._added, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest))) if longest else None
        firsts = "".join(sorted({re.escape(content[0]) for content in self._added}))
        self._begins = re.compile(f"[{firsts}]") if firsts else None
        kept = [tag for tag in REASONING if tag in self._added and not self._added[tag][1].special]
        self._kept = re.compile(f"({'|'.join(map(re.escape, kept))})") if kept else None
        fields = json.loads(tokenizer.to_str())
        self._never_text = {token for token, _ in self._added.values()} - _unknown(fields["model"])
        self._is_byte_level = '"ByteLevel"' in json.dumps(fields["decoder"])
        self._guard = f"<{secrets.token_hex(16)}>"  # in no text
        self._plain = self._without_added_tokens(fields)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a prompt, as the backend computes them for an input ``text``.

        Special tokens in it are read as such.

        Raises:
            TokenizerError: the library failed.
        """
        ids = encode(self._tokenizer, text, add_special_tokens=add_special_tokens)
        first = self._first
        if add_special_tokens and first and ids[: 2 * len(first)] == first + first:
            ids = ids[len(first) :]
        return ids

    def marks(self, contents: Iterable[str]) -> Marks:
        """Marks that are in none of these texts.

        Raises:
            TokenizerError: they have every character that could be one.
        """
        used = set[str]().union(*contents)
        free = [mark for mark in MARKS if mark not in used]
        if not free:
            raise TokenizerError(
                "the messages have every one of the characters U+FDD0 to U+FDEF, which are reserved"
            )
        return Marks(free[0], self._begins, self._kept)

    def encode_marked(self, text: str, marks: Marks) -> list[int]:
        """The token ids of a rendered chat: special tokens are read where there are no marks.

        Raises:
            TokenizerError: the library failed, or a content cannot be kept apart.
        """
        clean = marks.remove(text)
        if self._pattern is None:
            return encode(self._tokenizer, clean, add_special_tokens=False)
        if self._own_tokens(text, marks.mark) == self._own_tokens(clean, marks.mark):
            return encode(self._tokenizer, clean, add_special_tokens=False)
        ids: list[int] = []
        for part, token in self._parts(text):
            if token is not None:
                ids.append(token)
            elif part:
                ids += self._encode_plain(marks.remove(part), begins=not ids)
        return ids

    def _parts(self, text: str) -> Iterator[tuple[str, int | None]]:
        """The text between tokens, and the tokens; spaces that a token takes with it are gone."""
        assert self._pattern is not None
        end, strip = 0, False
        for match in self._pattern.finditer(text):
            token, added = self._added[match[0]]
            between = text[end : match.start()]
            between = between.lstrip() if strip else between
            yield between.rstrip() if added.lstrip else between, None
            yield "", token
            end, strip = match.end(), added.rstrip
        yield text[end:].lstrip() if strip else text[end:], None

    def _own_tokens(self, text: str, mark: str) -> list[tuple[int, str]]:
        """Where added tokens begin in a text, marks not counted, and which."""
        assert self._pattern is not None
        places, end, num_marks = [], 0, 0
        for match in self._pattern.finditer(text):
            num_marks += text.count(mark, end, match.start())
            end = match.start()
            places.append((end - num_marks, match[0]))
        return places

    def _without_added_tokens(self, fields: dict[str, Any]) -> Tokenizer:
        """The tokenizer with the guard as its only added token, beside runs of spaces."""
        kept = [each for each in fields["added_tokens"] if each["content"] not in self._added]
        plain: Tokenizer = Tokenizer.from_str(json.dumps(fields | {"added_tokens": kept}))
        plain.add_special_tokens([AddedToken(self._guard, special=True, normalized=False)])
        return plain

    def _encode_plain(self, text: str, *, begins: bool) -> list[int]:
        """The token ids of a text without any added token.

        Some tokenizers put a space before the beginning of all, so a guard stands for the token
        before a text that is not the beginning.
        """
        ids = encode(self._plain, text if begins else self._guard + text, add_special_tokens=False)
        ids = ids if begins else ids[1:]
        if self._never_text.intersection(ids):
            raise TokenizerError(
                "a message has the text of a special token, which this model's tokenizer cannot "
                "read as text; take it out of the message"
            )
        return ids

    def token_bytes(self, token: int) -> bytes:
        """What a token stands for, which may be a part of a character."""
        piece: str | None = self._tokenizer.id_to_token(token)
        if piece is None:
            return b""
        if piece in self._added:
            return piece.encode()
        if match := BYTE_TOKEN.fullmatch(piece):
            return bytes([int(match[1], 16)])
        if self._is_byte_level and all(character in _BYTES for character in piece):
            return bytes(_BYTES[character] for character in piece)
        return piece.replace(WORD_START, " ").encode()

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, without special ones.

        Raises:
            TokenizerError: the library failed.
        """
        return decode(self._tokenizer, list(ids))

    def added_token(self, text: str) -> int | None:
        """The added token with this text; None if there is none."""
        return self._added[text][0] if text in self._added else None

    def with_markers(self, prompt: Sequence[int], markers: Iterable[str]) -> "MarkedText":
        """The text of a generation, with those of its special tokens that are such markers.

        Args:
            prompt: the tokens before.
            markers: texts, some of which may be special tokens.
        """
        special = {token for token, added in self._added.values() if added.special}
        shown = {
            token: text
            for text in markers
            if (token := self.added_token(text)) is not None and token in special
        }
        return MarkedText(self._tokenizer, prompt, special, shown)

    def first_added_token(self, text: str) -> int | None:
        """The added token with which a text begins, if it begins with one."""
        match = self._pattern.match(text) if self._pattern is not None else None
        return self._added[match[0]][0] if match else None


class MarkedText:
    """The text of a generation in which some special tokens have their text.

    The backend's text has none of special tokens. Where one belongs is found by decoding the tokens
    before it; nothing is decoded where there is no such token in the vocabulary.

    Args:
        tokenizer: of the model.
        prompt: the tokens before.
        special: the special tokens.
        shown: the text of those to show.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        special: Collection[int],
        shown: Mapping[int, str],
    ) -> None:
        self._shown = shown
        self._detokenizer = Detokenizer(tokenizer, list(prompt), special) if shown else None
        self._waiting: deque[tuple[int, str]] = deque()  # characters before a marker, and its text
        self._decoded = self._received = 0

    def append(self, tokens: Sequence[int], text: str) -> str:
        """Add a piece of a generation; returns its text with the markers in it.

        Args:
            tokens: of the piece.
            text: the backend's text, which may come later than its tokens.
        """
        if self._detokenizer is None:
            return text
        for token in tokens:
            if token in self._shown:
                self._waiting.append((self._decoded, self._shown[token]))
            else:
                self._decoded += len(self._detokenizer.append([token]))
        parts, done, begin = list[str](), 0, self._received
        self._received += len(text)
        while self._waiting and self._waiting[0][0] <= self._received:
            place, marker = self._waiting.popleft()
            end = max(done, place - begin)
            parts += [text[done:end], marker]
            done = end
        return "".join([*parts, text[done:]])


def _unknown(model: dict[str, Any]) -> set[int]:
    """The token that stands for what a tokenizer has no token for."""
    if model.get("unk_id") is not None:
        return {model["unk_id"]}
    vocabulary = model.get("vocab") or {}
    unknown = model.get("unk_token")
    return {vocabulary[unknown]} if unknown in vocabulary else set()


def _bytes_of_characters() -> dict[str, int]:
    """The bytes that the characters of byte-level tokens stand for, as GPT-2 introduced it."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {chr(byte): byte for byte in printable}
    return characters | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES = _bytes_of_characters()
