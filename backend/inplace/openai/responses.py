"""Answers in OpenAI's formats: of a chat and of a completion, whole and as chunks of a stream."""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from inplace.client import Piece, PromptLogprob, TokenLogprob
from inplace.openai.call_reader import CallBegin, Content, Event
from inplace.openai.generations import Part
from inplace.openai.structure import Structure
from inplace.openai.tokenizer import MarkedText, TextTokenizer

FINISH_REASONS = {"length": "length", "capacity": "length", "eos": "stop", "stop": "stop"}
"""OpenAI's words for the reasons of the backend."""

MIN_LOGPROB = -9999.0
"""What stands for a logarithm of zero, which JSON cannot have."""

MAX_HIDDEN = 4
"""Characters that tokens before may not show: the parts of one character have no text each."""


class Answer(ABC):
    """The answer to one request, from the pieces of its generations.

    Args:
        request_id: the end of the answer's id.
        model: the name of the model.
        tokenizer: of the model.
        prompt_tokens: tokens of all prompts.
        choices: number of generations.
        logprobs: whether the tokens' log-probabilities are returned.

    Attributes:
        completion_tokens: tokens of all choices so far.
        cached_tokens: tokens of prompts that earlier requests had computed.
    """

    prefix: str
    kind: str
    chunk_kind: str

    def __init__(
        self,
        request_id: str,
        model: str,
        tokenizer: TextTokenizer,
        prompt_tokens: int,
        choices: int,
        *,
        logprobs: bool,
    ) -> None:
        self._id = f"{self.prefix}-{request_id}"
        self._model, self._tokenizer, self._logprobs = model, tokenizer, logprobs
        self._created = int(time.time())
        self._prompt_tokens = prompt_tokens
        self.completion_tokens = self.cached_tokens = 0
        self._texts: list[list[str]] = [[] for _ in range(choices)]
        self._tokens: list[list[TokenLogprob | PromptLogprob]] = [[] for _ in range(choices)]
        self._reasons: list[str] = [""] * choices

    @property
    def usage(self) -> dict[str, Any]:
        """Tokens of the request."""
        return {
            "prompt_tokens": self._prompt_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "completion_tokens": self.completion_tokens,
            "total_tokens": self._prompt_tokens + self.completion_tokens,
        }

    def add(self, part: Part) -> None:
        """Add a part of a choice, for the whole answer."""
        index, piece = part.index, part.piece
        self._count(part)
        self._texts[index].append(piece.text)
        self._tokens[index] += [*part.prompt, *piece.logprobs]
        self._reasons[index] = FINISH_REASONS.get(piece.finish_reason, "")

    def _count(self, part: Part) -> None:
        self.completion_tokens += len(part.piece.tokens)
        self.cached_tokens += part.cached_tokens

    def whole(self) -> dict[str, Any]:
        """The answer to a request that is not streamed."""
        choices = [self._choice(index) for index in range(len(self._texts))]
        return self._body(self.kind, choices) | {"usage": self.usage}

    def chunks(self, part: Part, *, usage: bool) -> Iterator[dict[str, Any]]:
        """The chunks of a stream for a part of a choice.

        Args:
            part: the next part.
            usage: whether the stream ends with the usage, so that each chunk has that field.
        """
        self._count(part)
        for choice in self._chunk_choices(part):
            yield self._body(self.chunk_kind, [choice]) | ({"usage": None} if usage else {})

    def usage_chunk(self) -> dict[str, Any]:
        """The last chunk of a stream with usage."""
        return self._body(self.chunk_kind, []) | {"usage": self.usage}

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }

    def _token(self, token: int, logprob: float) -> tuple[str, bytes, float]:
        content = self._tokenizer.token_bytes(token)
        return content.decode(errors="replace"), content, max(logprob, MIN_LOGPROB)

    @abstractmethod
    def _choice(self, index: int) -> dict[str, Any]:
        """A choice of the whole answer."""

    @abstractmethod
    def _chunk_choices(self, part: Part) -> Iterator[dict[str, Any]]:
        """A choice of each chunk for a part."""


class _Reply:
    """One reply of a chat: its text, and the calls in it.

    Args:
        structure: what it is.
        text: what makes the tokens of openings visible.
    """

    def __init__(self, structure: Structure, text: MarkedText) -> None:
        self._format, self._text = structure.format, text
        self._reader = structure.reader()
        self._content: list[str] = []
        self._calls: list[dict[str, Any]] = []
        self._arguments: list[list[str]] = []

    def deltas(self, piece: Piece) -> list[dict[str, Any]]:
        """What a piece adds, as OpenAI streams it; texts that follow each other are one."""
        if self._reader is None:
            events: list[Event] = [Content(piece.text)] if piece.text else []
        else:
            events = self._reader.append(self._text.append(piece.tokens, piece.text))
            events += self._reader.flush() if piece.finish_reason else []
        made: list[dict[str, Any]] = []
        for kind, group in groupby(events, type):
            if kind is CallBegin:
                made += [self._begin(each) for each in group if isinstance(each, CallBegin)]
            else:
                text = "".join(each.text for each in group if not isinstance(each, CallBegin))
                made.append(self._add(text) if kind is Content else self._add_arguments(text))
        return made

    def _add(self, text: str) -> dict[str, Any]:
        self._content.append(text)
        return {"content": text}

    def _begin(self, begin: CallBegin) -> dict[str, Any]:
        assert self._format is not None
        call = {
            "id": self._format.new_id(),
            "type": "function",
            "function": {"name": begin.function, "arguments": ""},
        }
        self._calls.append(call)
        self._arguments.append([])
        return {"tool_calls": [{"index": len(self._calls) - 1, **call}]}

    def _add_arguments(self, text: str) -> dict[str, Any]:
        self._arguments[-1].append(text)
        index = len(self._calls) - 1
        return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}

    def reason(self, reason: str) -> str:
        """Why it ended: calls that are complete are a reason of their own."""
        is_called = self._calls and self._reader is not None and not self._reader.is_inside_call
        return "tool_calls" if is_called and reason == "stop" else reason

    @property
    def message(self) -> dict[str, Any]:
        """The whole message."""
        content = "".join(self._content)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if self._calls:
            calls = [
                call | {"function": call["function"] | {"arguments": "".join(arguments)}}
                for call, arguments in zip(self._calls, self._arguments, strict=True)
            ]
            message |= {"content": content or None, "tool_calls": calls}
        return message


class ChatAnswer(Answer):
    """The answer to a chat.

    Args:
        request_id, model, tokenizer, choices, logprobs: as in `Answer`.
        prompt: its tokens.
        structure: what each reply is.
    """

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(
        self,
        request_id: str,
        model: str,
        tokenizer: TextTokenizer,
        prompt: list[int],
        choices: int,
        *,
        structure: Structure,
        logprobs: bool,
    ) -> None:
        super().__init__(request_id, model, tokenizer, len(prompt), choices, logprobs=logprobs)
        markers = () if structure.format is None else structure.format.markers
        self._replies = [
            _Reply(structure, tokenizer.with_markers(prompt, markers)) for _ in range(choices)
        ]
        self._begun: set[int] = set()

    def add(self, part: Part) -> None:
        """Add a part of a choice, for the whole answer."""
        super().add(part)
        self._replies[part.index].deltas(part.piece)

    def _choice(self, index: int) -> dict[str, Any]:
        reply = self._replies[index]
        return {
            "index": index,
            "message": reply.message,
            "logprobs": self._logprobs_of(self._tokens[index]) if self._logprobs else None,
            "finish_reason": reply.reason(self._reasons[index]),
        }

    def _chunk_choices(self, part: Part) -> Iterator[dict[str, Any]]:
        index, piece, reply = part.index, part.piece, self._replies[part.index]
        if index not in self._begun:
            self._begun.add(index)
            yield self._delta(index, {"role": "assistant", "content": ""})
        logprobs = self._logprobs_of(piece.logprobs) if self._logprobs else None
        deltas = reply.deltas(piece) or ([{"content": ""}] if piece.logprobs else [])
        for delta in deltas:
            yield self._delta(index, delta, logprobs)
            logprobs = None  # they are the piece's, not the delta's
        if (reason := FINISH_REASONS.get(piece.finish_reason)) is not None:
            yield self._delta(index, {}, reason=reply.reason(reason))

    def _delta(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        reason: str | None = None,
    ) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs_of(self, tokens: Sequence[TokenLogprob | PromptLogprob]) -> dict[str, Any]:
        return {
            "content": [
                self._entry(each.token, each.logprob or 0.0)
                | {"top_logprobs": [self._entry(*likely) for likely in each.top]}
                for each in tokens
            ]
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text, content, value = self._token(token, logprob)
        return {"token": text, "logprob": value, "bytes": list(content)}


class CompletionAnswer(Answer):
    """The answer to a completion.

    Args:
        echoes: the text that each choice begins with.
        **arguments: as in `Answer`.
    """

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, *arguments: Any, echoes: Sequence[str], logprobs: bool) -> None:
        super().__init__(*arguments, logprobs=logprobs)
        self._prompts, self._echoes = tuple(echoes), list(echoes)
        self._offsets = [len(echo) for echo in echoes]
        self._prompt_offsets = [0 for _ in echoes]

    def _choice(self, index: int) -> dict[str, Any]:
        text = self._echoes[index] + "".join(self._texts[index])
        return self._entry(index, text, self._tokens[index], self._reasons[index])

    def _chunk_choices(self, part: Part) -> Iterator[dict[str, Any]]:
        index, piece = part.index, part.piece
        echo, self._echoes[index] = self._echoes[index], ""
        if echo or piece.text or piece.logprobs or piece.finish_reason:
            reason = FINISH_REASONS.get(piece.finish_reason)
            tokens: list[TokenLogprob | PromptLogprob] = [*part.prompt, *piece.logprobs]
            yield self._entry(index, echo + piece.text, tokens, reason)

    def _entry(
        self,
        index: int,
        text: str,
        tokens: Sequence[TokenLogprob | PromptLogprob],
        reason: str | None,
    ) -> dict[str, Any]:
        logprobs = self._logprobs_of(index, tokens) if self._logprobs else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs_of(
        self, index: int, tokens: Sequence[TokenLogprob | PromptLogprob]
    ) -> dict[str, Any]:
        """As parallel lists; an offset counts characters of the choice's text."""
        texts, values, likely, offsets = [], [], [], []
        for each in tokens:
            text, content, value = self._token(each.token, each.logprob or 0.0)
            texts.append(_name(text, content))
            known = each.logprob is not None
            values.append(value if known else None)
            top = [self._token(*one) for one in each.top]
            names = {_name(name, content): number for name, content, number in top}
            likely.append(names if known else None)
            offsets.append(self._offset(index, text, of_prompt=isinstance(each, PromptLogprob)))
        return {
            "tokens": texts,
            "token_logprobs": values,
            "top_logprobs": likely,
            "text_offset": offsets,
        }

    def _offset(self, index: int, text: str, *, of_prompt: bool) -> int:
        """Where a token's text begins; a special token, which adds none, is where the next is."""
        if not of_prompt:
            offset = self._offsets[index]
            self._offsets[index] += len(text)
            return offset
        offset = self._prompt_offsets[index]
        place = self._prompts[index].find(text, offset, offset + len(text) + MAX_HIDDEN)
        if place >= 0:
            self._prompt_offsets[index] = place + len(text)
            return place
        return offset


def _name(text: str, content: bytes) -> str:
    """A token as completions name it; one that is not text by its bytes, as OpenAI does it."""
    if text.encode() == content:
        return text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)
