"""Requests of OpenAI's protocol, as far as this front end speaks it.

A field of a request that is not here is an error. docs/openai.md has a table of all of them.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, Json, model_validator

Ignored = Annotated[Any, Field(json_schema_extra={"treatment": "ignored"})]
"""A field that is accepted, whatever its value, and changes nothing."""

Refused = Annotated[None, Field(json_schema_extra={"treatment": "refused"})]
"""A field of OpenAI's that may be null only."""


class RequestPart(BaseModel):
    """A part of a request: an unknown field is an error, and no value is converted."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class TextPart(RequestPart):
    """A text among the contents of a message."""

    type: Literal["text"]
    text: str


class FunctionCall(RequestPart):
    """The function of a call that a reply has made, with its arguments: an object, as JSON."""

    name: str
    arguments: Json[dict[str, Any]]


class ToolCall(RequestPart):
    """A call that a reply has made."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(RequestPart):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: Refused = None
    audio: Refused = None
    function_call: Refused = None

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError(f"a message of the role {self.role!r} needs a content")
        return self

    @property
    def text(self) -> str:
        """The content as one text: parts are lines."""
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content)
        return self.content or ""


class StreamOptions(RequestPart):
    """What a stream has beside the choices."""

    include_usage: bool = False
    include_obfuscation: Ignored = None


class JsonSchema(RequestPart):
    """A named JSON schema."""

    name: str
    schema_: dict[str, Any] = Field(alias="schema")
    description: Ignored = None
    strict: Ignored = None


class ResponseFormat(RequestPart):
    """What a reply must be. The types after ``json_schema`` are not OpenAI's."""

    type: Literal["text", "json_object", "json_schema", "regex", "grammar", "choice"]
    json_schema: JsonSchema | None = None
    regex: str | None = None
    grammar: str | None = None
    choice: list[str] | None = None

    @model_validator(mode="after")
    def _has_its_field(self) -> Self:
        given = {name for name in type(self).model_fields if getattr(self, name) is not None}
        needed = {"type"} | ({self.type} - {"text", "json_object"})
        if given != needed:
            raise ValueError(f"the type {self.type!r} has the fields {sorted(needed)}")
        return self


class ToolFunction(RequestPart):
    """A function that a reply may call."""

    name: str = Field(pattern="^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Ignored = None


class Tool(RequestPart):
    """A tool that a reply may call."""

    type: Literal["function"]
    function: ToolFunction


class ChosenFunction(RequestPart):
    """The name of a function."""

    name: str


class ToolChoice(RequestPart):
    """The tool that a reply must call."""

    type: Literal["function"]
    function: ChosenFunction


class SamplingRequest(RequestPart):
    """The fields that chats and completions share.

    Fields with the name of a request parameter of the backend have its limits, see
    docs/protocol.md.
    """

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    n: int | None = Field(default=None, ge=1)
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    prompt_cache_key: str | None = None
    cache_salt: str | None = None
    metadata: Ignored = None
    prompt_cache_options: Ignored = None
    prompt_cache_retention: Ignored = None
    safety_identifier: Ignored = None
    service_tier: Ignored = None
    store: Ignored = None
    user: Ignored = None

    @model_validator(mode="after")
    def _streams_for_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options are for a request with stream=true")
        return self

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """The texts that end a generation."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ChatRequest(SamplingRequest):
    """The body of ``/v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = Field(default=None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    prediction: Ignored = None
    reasoning_effort: Ignored = None
    verbosity: Ignored = None
    modalities: list[Literal["text"]] | None = None
    audio: Refused = None
    function_call: Refused = None
    functions: Refused = None
    moderation: Refused = None
    web_search_options: Refused = None

    @model_validator(mode="after")
    def _has_one_limit(self) -> Self:
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise ValueError("max_tokens and max_completion_tokens are the same: send one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is for a request with logprobs=true")
        return self


class CompletionRequest(SamplingRequest):
    """The body of ``/v1/completions``."""

    prompt: str | list[int] | list[str] | list[list[int]]
    echo: bool | None = None
    logprobs: int | None = None
    add_special_tokens: bool | None = None
    best_of: Refused = None
    suffix: Refused = None
