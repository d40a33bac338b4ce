"""What one request may ask for, and reading its body within that."""

from dataclasses import dataclass
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from inplace.openai.errors import ApiError, invalid_value, of_validation

Body = TypeVar("Body", bound=BaseModel)


@dataclass(frozen=True)
class Limits:
    """Limits of the front end.

    Attributes:
        body_bytes: of a request's body.
        audio_bytes: of the body of a transcription.
        audio_seconds: of a recording.
        choices: ``n``.
        prompts: of one completion.
        generations: ``n`` times the prompts.
        requests: in flight at the same time.
    """

    body_bytes: int = 4 << 20
    audio_bytes: int = 32 << 20
    audio_seconds: float = 1800.0
    choices: int = 16
    prompts: int = 64
    generations: int = 64
    requests: int = 1024


async def read_body(request: Request, model: type[Body], limits: Limits) -> Body:
    """Read and check the body of a request.

    Raises:
        ApiError: it is not JSON of this kind, or too long.
    """
    content = await read_bytes(request, "application/json", limits.body_bytes)
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        raise of_validation(error) from None


async def read_bytes(request: Request, media_type: str, most: int) -> bytes:
    """The body of a request.

    Raises:
        ApiError: it is of another media type, has more than ``most`` bytes, or is compressed.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != media_type:
        raise ApiError(
            415,
            f"the header Content-Type is {kind!r}; expected {media_type!r}",
            code="unsupported_media_type",
        )
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise ApiError(
            415,
            f"the body is compressed ({encoding!r}); send it as it is",
            code="unsupported_media_type",
        )
    parts, length = [], 0
    try:
        async for part in request.stream():
            parts.append(part)
            length += len(part)
            if length > most:
                raise ApiError(
                    413, f"the body has more than {most} bytes", code="request_too_large"
                )
    except ClientDisconnect:
        raise ApiError(400, "the client closed the connection", code="disconnected") from None
    return b"".join(parts)


def check_counts(limits: Limits, *, choices: int, prompts: int) -> None:
    """Refuse a request for too many generations.

    Raises:
        ApiError: of them, or of prompts or choices alone.
    """
    for param, value, most in (("n", choices, limits.choices), ("prompt", prompts, limits.prompts)):
        if value > most:
            raise invalid_value(
                f"the field {param!r} asks for {value}; at most {most} are allowed", param
            )
    if choices * prompts > limits.generations:
        raise invalid_value(
            f"{prompts} prompts with n={choices} are {choices * prompts} generations; at most "
            f"{limits.generations} are allowed",
            "n",
        )
