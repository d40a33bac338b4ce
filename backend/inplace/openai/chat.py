"""Chats: from messages to the token ids of a prompt."""

import json
from collections.abc import Sequence
from typing import Any

from inplace.drivers.detokenizer import TokenizerError
from inplace.openai.errors import ApiError, invalid_value
from inplace.openai.models import ServedModel
from inplace.openai.schemas import Message, Tool
from inplace.openai.templates import TemplateError
from inplace.openai.tokenizer import Marks

ROLES = {"developer": "system"}
"""The roles that templates know by another name."""


def chat_prompt(
    model: ServedModel, messages: Sequence[Message], tools: Sequence[Tool] = ()
) -> list[int]:
    """The token ids of a chat, up to where the reply begins.

    Args:
        model: the model.
        messages: of the chat.
        tools: what the reply may call; a template without tools leaves them out.

    No content of a message becomes a special token.

    Raises:
        ApiError: the model has no chat template, or one that does not take these messages.
    """
    if model.template is None:
        raise ApiError(
            400,
            f"the model {model.name!r} has no chat template: send a prompt to /v1/completions",
            param="model",
            code="no_chat_template",
        )
    try:
        described = [tool.model_dump(exclude_none=True) for tool in tools]
        sent = [described, *(message.model_dump() for message in messages)]
        marks = model.tokenizer.marks(json.dumps(each, ensure_ascii=False) for each in sent)
        rendered = model.template.render(
            [_for_template(message, marks) for message in messages],
            add_generation_prompt=True,
            tools=marks.add(described) or None,
        )
        return model.tokenizer.encode_marked(rendered, marks)
    except (TemplateError, TokenizerError) as error:
        raise invalid_value(str(error), "messages") from error


def _for_template(message: Message, marks: Marks) -> dict[str, Any]:
    """A message as templates know it."""
    reply = message.role == "assistant"
    made: dict[str, Any] = {
        "role": ROLES.get(message.role, message.role),
        "content": marks.add(message.text, reply=reply),
    }
    for name in ("name", "tool_call_id"):
        if (value := getattr(message, name)) is not None:
            made[name] = marks.add(value)
    if message.tool_calls:
        # arguments are a mapping, as transformers has it: templates write them as JSON themselves
        made["tool_calls"] = [
            {"type": call.type} | marks.add({"id": call.id, "function": call.function.model_dump()})
            for call in message.tool_calls
        ]
    return made
