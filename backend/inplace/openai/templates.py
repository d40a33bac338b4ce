"""A model's own chat template, rendered in Jinja's sandbox.

The environment and the functions are those that transformers gives to templates.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from inplace.errors import InplaceError, LoadError

MAX_RENDERED_LENGTH = 1 << 25
"""Characters of a rendered chat."""


class TemplateError(InplaceError):
    """A chat cannot be rendered: the template refuses it, or fails."""


class _Generation(Extension):
    """The block ``{% generation %}``, which marks replies for training; it changes no text."""

    tags = {"generation"}  # noqa: RUF012 # as in its base class

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(layout: str) -> str:
    return datetime.now().astimezone().strftime(layout)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: its text.
        tokens: texts of the tokenizer's tokens by the names that templates know them by, such as
            ``bos_token``.

    Raises:
        LoadError: it is not a template.

    Attributes:
        source: its text.
    """

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        functions: dict[str, Callable[..., Any]] = {
            "raise_exception": _raise_exception,
            "strftime_now": _now,
        }
        environment.globals.update(functions)
        self.source, self._tokens = source, dict(tokens)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise LoadError(f"the chat template cannot be compiled: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Any] | None = None,
    ) -> str:
        """The text of a chat.

        Raises:
            TemplateError: the template refuses the messages or fails, or the text is too long.
        """
        try:
            parts = self._template.generate(
                messages=messages,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                **self._tokens,
            )
            return _joined(parts)
        except TemplateError:
            raise
        except Exception as error:  # of any type: a template calls what it likes
            raise TemplateError(
                f"the model's chat template does not take these messages: {error}"
            ) from error


def _joined(parts: Any) -> str:
    texts, length = [], 0
    for part in parts:
        texts.append(part)
        length += len(part)
        if length > MAX_RENDERED_LENGTH:
            raise TemplateError(f"the chat has more than {MAX_RENDERED_LENGTH} characters")
    return "".join(texts)
