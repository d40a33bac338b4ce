"""Transcriptions: a recording in a form, its samples within limits, and its words as they come."""

import io
from collections.abc import AsyncIterator, Mapping
from typing import Any, Literal

import numpy as np
import soundfile
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from inplace.client import AsyncSequence, ClientError
from inplace.client.recordings import AudioFormat, Samples, cut
from inplace.client.requests import decode_text
from inplace.openai.errors import ApiError, invalid_value, of_client, of_validation
from inplace.openai.limits import read_bytes
from inplace.openai.schemas import Ignored, Refused
from inplace.protocol import AUDIO, SAMPLE_RATE, TEXT_OUTPUT

MAX_CHANNELS = 8
"""Channels of a recording."""

MAX_FIELDS = 32
"""Fields of a form."""


class TranscriptionRequest(BaseModel):
    """The fields of the form of ``/v1/audio/transcriptions``, beside ``file``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    language: str | None = None
    response_format: Literal["json", "text"] = "json"
    stream: bool = False
    temperature: Literal["0", "0.0"] | None = None
    chunking_strategy: Ignored = None
    prompt: Refused = None
    include: Refused = None
    timestamp_granularities: Refused = None


async def read_form(request: Request, most_bytes: int) -> tuple[TranscriptionRequest, bytes]:
    """The fields of a transcription and its file.

    Raises:
        ApiError: the body is no such form, or too long.
    """
    content = await read_bytes(request, "multipart/form-data", most_bytes)
    fields, files = await _parse(request.headers, content)
    if files.keys() != {"file"}:
        raise invalid_value(f"the form has the files {sorted(files)}; expected one, 'file'", "file")
    try:
        return TranscriptionRequest.model_validate(fields), files["file"]
    except ValidationError as error:
        raise of_validation(error) from None


async def _parse(headers: Headers, content: bytes) -> tuple[dict[str, str], dict[str, bytes]]:
    """The fields and the files of a form."""

    async def body() -> AsyncIterator[bytes]:
        yield content

    parser = MultiPartParser(headers, body(), max_files=1, max_fields=MAX_FIELDS)  # type: ignore[arg-type] # it takes any iterator
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError) as error:
        raise invalid_value(f"the body is not a form: {error}") from error
    fields: dict[str, str] = {}
    files: dict[str, bytes] = {}
    for name, value in form.multi_items():
        name = name.removesuffix("[]")
        if name in fields or name in files:
            await form.close()
            raise invalid_value(f"the field {name!r} is there twice", name)
        if isinstance(value, UploadFile):
            files[name] = await value.read()
        else:
            fields[name] = value
    await form.close()
    return fields, files


def decode(content: bytes, rate: int, most_seconds: float) -> Samples:
    """The samples of a recording, its channels averaged.

    It is decoded a second at a time, so that a small file with hours of silence ends early.

    Raises:
        ApiError: it is not audio that libsndfile reads, too long, or has another rate.
    """
    parts, length = [], 0
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            if file.samplerate != rate:
                raise _wrong(
                    f"the recording has {file.samplerate} samples in a second, the model takes "
                    f"{rate}: resample it, for example with `ffmpeg -i recording -ar {rate} "
                    "resampled.wav`"
                )
            if file.channels > MAX_CHANNELS:
                raise _wrong(
                    f"the recording has {file.channels} channels; at most {MAX_CHANNELS} are taken"
                )
            for block in file.blocks(blocksize=rate, dtype="float32", always_2d=True):
                parts.append(block.mean(1))
                length += len(block)
                if length > most_seconds * rate:
                    raise _wrong(f"the recording is longer than {most_seconds:g} s")
    except (soundfile.LibsndfileError, RuntimeError, ValueError) as error:
        raise _wrong(f"the file cannot be read as audio: {error}") from error
    if not length:
        raise _wrong("the recording has no samples")
    return np.ascontiguousarray(np.concatenate(parts))


def _wrong(text: str) -> ApiError:
    return invalid_value(text, "file")


async def words(
    sequence: AsyncSequence,
    samples: Samples,
    format: AudioFormat,
    options: Mapping[str, str],
    request_id: str,
) -> AsyncIterator[str]:
    """The text of a recording, piece by piece.

    Args:
        sequence: of the served model; ends with the recording.
        samples: of the recording.
        format: what the model takes.
        options: further request parameters, such as ``language``.
        request_id: for logs and errors; the number of a part is added to it.

    Raises:
        ApiError: the server refused, or did not answer.
    """
    parts = cut(samples, format, format.part_samples(None, realtime=False))
    parameters: dict[str, Any] = {SAMPLE_RATE: format.rate, **options}
    try:
        for place, part in enumerate(parts):
            end = place == len(parts) - 1
            async for outputs in sequence.stream(
                {AUDIO: part},
                end=end,
                parameters=parameters,
                request_id=f"{request_id}-{place}",
            ):
                if piece := decode_text(outputs, TEXT_OUTPUT):
                    yield piece
    except ClientError as error:
        raise of_client(error) from error
