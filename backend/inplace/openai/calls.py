"""The formats in which models write calls of tools, and grammars of replies that may have calls."""

import json
import re
import secrets
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from inplace.openai.tokenizer import TextTokenizer

SPACE = r"( |\n {0,16})?"
"""What may stand between two parts of a call: a bounded part, so that a call ends."""

ANY_SPACE = r"[ \t\n\r]*"
"""The same, before it is certain that a reply is a call."""

OPEN, CLOSE, NAME = r"\{", r"\}", '"name"'
"""Parts of a call, as regular expressions."""

ID_CHARACTERS = string.ascii_letters + string.digits


@dataclass(frozen=True)
class CallFormat:
    """How a model writes calls: objects in JSON with the name of a function and its arguments.

    Attributes:
        name: as vLLM's ``--tool-call-parser`` has it.
        opening: what is before calls.
        needs_opening: there is no call without it, and text may be around calls. Otherwise the
            whole reply is calls, and the opening may be absent.
        arguments: the key of the arguments.
        brackets: around the calls behind an opening; empty, or two texts.
        separator: between calls; empty where each call has an opening of its own.
        closing: what is behind calls.
        id_length: how many letters and digits an id has, where chat templates demand it.
    """

    name: str
    opening: str = ""
    needs_opening: bool = False
    arguments: str = "arguments"
    brackets: tuple[str, ...] = ()
    separator: str = ""
    closing: str = ""
    id_length: int | None = None

    @property
    def markers(self) -> tuple[str, ...]:
        """The texts that may be tokens of a tokenizer."""
        return tuple(text for text in (self.opening, self.closing) if text)

    def new_id(self) -> str:
        """An id for a call."""
        if self.id_length is None:
            return f"call_{secrets.token_hex(12)}"
        return "".join(secrets.choice(ID_CHARACTERS) for _ in range(self.id_length))


HERMES = CallFormat("hermes", "<tool_call>", needs_opening=True, closing="</tool_call>")
LLAMA3_JSON = CallFormat("llama3_json", "<|python_tag|>", arguments="parameters", separator=";")
MISTRAL = CallFormat(
    "mistral",
    "[TOOL_CALLS]",
    needs_opening=True,
    brackets=("[", "]"),
    separator=",",
    id_length=9,
)
JSON = CallFormat("json", separator=";")

FORMATS = {each.name: each for each in (HERMES, LLAMA3_JSON, MISTRAL, JSON)}
"""All formats by name."""

_SIGNS = (
    (MISTRAL, r"\[TOOL_CALLS\](?!(?s:.)*\[ARGS\])"),
    (HERMES, r'<tool_call>\s*\{\s*"(name|arguments)"'),
    (LLAMA3_JSON, r'\{\s*"name":[^{}]*"parameters":'),
)
"""What is in the chat templates of models that write a format."""


def format_of_template(source: str) -> CallFormat | None:
    """The format that a chat template makes a model write; None if it is none of these."""
    text = source.replace("\\n", "\n").replace("\\", "")
    return next((each for each, sign in _SIGNS if re.search(sign, text)), None)


@dataclass(frozen=True)
class Function:
    """A function that a reply may call.

    Attributes:
        name: letters, digits, ``_`` and ``-``.
        schema: a JSON schema of its arguments, which is one of objects.
    """

    name: str
    schema: Mapping[str, Any]


class CallGrammar:
    """Grammars in Lark's notation, for replies that call functions.

    Args:
        format: of calls.
        functions: which may be called.
        tokenizer: of the model; openings and closings may be tokens of it.
        parallel: whether a reply may have several calls.
    """

    def __init__(
        self,
        format: CallFormat,
        functions: Sequence[Function],
        tokenizer: TextTokenizer,
        *,
        parallel: bool,
    ) -> None:
        self._format, self._functions = format, functions
        self._tokenizer, self._parallel = tokenizer, parallel

    def required(self) -> str:
        """Of replies that are calls and nothing else."""
        return self._joined(self._only_calls(), *self._call_rules())

    def or_json(self, schema: Mapping[str, Any]) -> str:
        """Of replies that are calls, or a value of a JSON schema; the format needs its opening."""
        assert self._format.needs_opening
        start = f"{self._only_calls()} | reply"
        return self._joined(start, f"reply: {_json(schema)}", *self._call_rules())

    def or_text(self) -> str:
        """Of replies that are any text, in which calls are whole and their arguments valid.

        Text and the opening behind it are one lazy terminal: it ends with the first opening, so no
        other terminal takes an opening for text.
        """
        written = self._format
        rules = ["TEXT: /(?s:.)+/", f"other: {self._other_tokens()}", *self._call_rules()]
        if not written.needs_opening:
            opening = f"({re.escape(written.opening)}{ANY_SPACE})?" if written.opening else ""
            begin = ANY_SPACE.join(("", opening + OPEN, NAME, ":", ""))
            rules += [f"FIRST: /{begin}/", f"begun: {self._alternatives('begun')}"]
            for place, name in enumerate(self._names()):
                rules += [
                    f"named_{place}[lazy]: FIRST {name}",
                    f"begun_{place}: named_{place} KEY arguments_{place}",
                ]
            more = f"({self._separator()} call)*" if self._parallel else ""
            token = self._token(written.opening)
            with_token = f" | {token} calls" if token is not None else ""
            start = f"begun {more}{with_token} | (TEXT? other)* TEXT?"
            return self._joined(start, *rules)
        rules.append(f"opening[lazy]: /(?s:.)*{re.escape(written.opening)}/")
        token = self._token(written.opening)
        opened = "opening" if token is None else f"(opening | TEXT? {token})"
        rules.append(f"opened: {opened} calls")
        once, many = "(TEXT? other)* (opened | TEXT)?", "(TEXT? other | opened)* TEXT?"
        return self._joined(many if self._parallel else once, *rules)

    def _only_calls(self) -> str:
        written = self._format
        if not written.needs_opening:
            return "calls"
        opening = self._token(written.opening) or json.dumps(written.opening)
        again = f" (/{SPACE}/ {opening} calls)*" if self._parallel and not written.separator else ""
        return f"{opening} calls{again}"

    def _call_rules(self) -> list[str]:
        """``calls``: what is behind an opening; ``call``: one of the calls there."""
        written = self._format
        calls = "call"
        if written.separator and self._parallel:
            calls += f" ({self._separator()} call)*"
        if written.brackets:
            first, last = written.brackets
            calls = f"/{SPACE}{re.escape(first)}/ {calls} /{SPACE}{re.escape(last)}/"
        if written.closing:
            token = self._token(written.closing)
            closing = json.dumps(written.closing)
            calls += f" /{SPACE}/ {closing if token is None else f'({token} | {closing})'}"
        rules = [
            f"calls: {calls}",
            f"call: {self._alternatives('call')}",
            f"BEGIN: /{SPACE.join(('', OPEN, NAME, ':', ''))}/",
            f"KEY: /{SPACE.join(('', ',', json.dumps(written.arguments), ':', ''))}/",
            f"END: /{SPACE}{CLOSE}/",
        ]
        for place, name in enumerate(self._names()):
            schema = self._functions[place].schema
            rules += [
                f"call_{place}: BEGIN {name} KEY arguments_{place}",
                f"arguments_{place}: {_json(schema)} END",
            ]
        return rules

    def _names(self) -> list[str]:
        """The names of the functions in JSON, as literals of the notation."""
        return [json.dumps(json.dumps(each.name)) for each in self._functions]

    def _alternatives(self, name: str) -> str:
        return " | ".join(f"{name}_{place}" for place in range(len(self._functions)))

    def _separator(self) -> str:
        return f"/{SPACE}{re.escape(self._format.separator)}/"

    def _token(self, marker: str) -> str | None:
        """A marker as a token; None where it is none."""
        token = self._tokenizer.added_token(marker) if marker else None
        return None if token is None else f"<[{token}]>"

    def _other_tokens(self) -> str:
        """The tokens that are neither text nor markers: a reply may have them, as without tools."""
        markers = {self._tokenizer.added_token(marker) for marker in self._format.markers}
        others = sorted(self._tokenizer.added_tokens - markers)
        # what nothing can match, where there are none
        return f"<[{','.join(map(str, others))}]>" if others else "/[^\\s\\S]/"

    def _joined(self, start: str, *rules: str) -> str:
        return "\n".join([f"start: {start}", *rules]) + "\n"


def _json(schema: Mapping[str, Any]) -> str:
    """A JSON schema inside a grammar; a text in it cannot be taken for a directive."""
    return "%json " + json.dumps(schema).replace("%", "\\u0025")
