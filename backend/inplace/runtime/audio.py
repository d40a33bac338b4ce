"""What a request with audio carries: samples in one of two inputs, their rate, and options."""

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from inplace.errors import Code, RequestError
from inplace.parameters import AUDIO_PARAMETERS, BY_NAME, Parameter, show
from inplace.protocol import AUDIO, AUDIO_INT16, SAMPLE_RATE
from inplace.schema.programs import Program
from inplace.schema.specs import Role, TensorSpec

INT16_SCALE = 1 / 32768
"""What an int16 sample is multiplied by."""

MAX_LEVEL = 8.0
"""The largest float32 sample. Full scale is 1; integers sent as floats are far larger."""

MAX_STREAM_SECONDS = 60
"""Seconds of a stream in one request; more take several."""

AUDIO_DTYPES = {AUDIO: torch.float32, AUDIO_INT16: torch.int16}
"""The inputs that samples may come in."""


def audio_spec(program: Program) -> TensorSpec | None:
    """The description of a program's audio; None if it takes none."""
    return next((spec for spec in program.client_inputs if spec.role is Role.AUDIO), None)


def check_audio_parameters(program: Program, parameters: Mapping[str, Parameter]) -> None:
    """Refuse parameters of audio that this model does not have, and another sample rate.

    Raises:
        RequestError: BAD_PARAMETER.
    """
    audio = audio_spec(program)
    known = {spec.name for spec in program.client_inputs if spec.role is Role.OPTION}
    if audio is not None:
        known.add(SAMPLE_RATE)
    if unknown := sorted(AUDIO_PARAMETERS & parameters.keys() - known):
        has = f"it has {sorted(known)}" if known else "it takes no audio"
        raise RequestError(
            Code.BAD_PARAMETER,
            f"this model does not have the parameters {unknown}; {has}: leave them out",
        )
    if audio is None or SAMPLE_RATE not in parameters:
        return
    rate = BY_NAME[SAMPLE_RATE].parse(parameters[SAMPLE_RATE])
    if rate != audio.sample_rate:
        raise RequestError(
            Code.BAD_PARAMETER,
            f"the audio has a {SAMPLE_RATE} of {rate}; this model takes {audio.sample_rate}: "
            f"resample it",
        )


def read_audio(
    spec: TensorSpec,
    inputs: Mapping[str, Tensor],
    parameters: Mapping[str, Parameter],
    *,
    last: bool,
) -> tuple[Tensor, Tensor]:
    """The samples of a request, float32 ``[spec.shape[0]]`` with zeros behind; and their number.

    Of a stream (`TensorSpec.lead`), as many as were sent; none where the last request has none.

    Args:
        spec: the program's audio.
        inputs: of the request, with a batch axis of 1.
        parameters: of the request, which `check_audio_parameters` has checked.
        last: the request is the last of its sequence (`TensorSpec.shorter`).

    Raises:
        RequestError: MISSING_INPUT, BAD_INPUT, BAD_DTYPE, BAD_SHAPE, EMPTY_INPUT, CAPACITY,
            VALUE_RANGE or BAD_PARAMETER.
    """
    given = [name for name in AUDIO_DTYPES if name in inputs]
    if spec.lead is not None and last and not given:
        return torch.zeros(0), count_tensor(0)
    if not given:
        raise RequestError(
            Code.MISSING_INPUT,
            f"the audio is missing: send samples in {AUDIO!r} (float32) or {AUDIO_INT16!r} (int16)",
        )
    if len(given) > 1:
        raise RequestError(
            Code.BAD_INPUT, f"the request has both {AUDIO!r} and {AUDIO_INT16!r}: send one of them"
        )
    name = given[0]
    samples = _check_samples(name, inputs[name], spec, last=last)
    if SAMPLE_RATE not in parameters:
        raise RequestError(
            Code.BAD_PARAMETER,
            f"parameter {SAMPLE_RATE!r} is missing: send the samples in a second, which must be "
            f"{spec.sample_rate} for this model",
        )
    if spec.lead is not None:
        return samples * INT16_SCALE if name == AUDIO_INT16 else samples, count_tensor(len(samples))
    audio = torch.zeros(spec.shape)
    audio[: len(samples)] = samples
    if name == AUDIO_INT16:
        audio *= INT16_SCALE
    return audio, count_tensor(len(samples))


@lru_cache(maxsize=64)
def count_tensor(count: int) -> Tensor:
    """A number of samples, ``[]``; cached, because most chunks have the same, and read-only."""
    return torch.tensor(count)


def _check_samples(name: str, tensor: Tensor, spec: TensorSpec, *, last: bool) -> Tensor:
    """The samples, ``[samples]``."""
    if tensor.dtype != AUDIO_DTYPES[name]:
        dtype = str(tensor.dtype).removeprefix("torch.")
        expected = str(AUDIO_DTYPES[name]).removeprefix("torch.")
        raise RequestError(Code.BAD_DTYPE, f"input {name!r} is {dtype}; expected {expected}")
    if tensor.dim() != 2 or tensor.shape[0] != 1:
        raise RequestError(
            Code.BAD_SHAPE,
            f"input {name!r} has the shape {list(tensor.shape)}; expected [1, samples]: one "
            f"channel, as one row",
        )
    samples, rate = tensor[0], spec.sample_rate or 1
    longest = spec.shape[0] if spec.lead is None else MAX_STREAM_SECONDS * rate
    if not len(samples):
        raise RequestError(Code.EMPTY_INPUT, f"input {name!r} is empty; send at least 1 sample")
    if len(samples) > longest:
        raise RequestError(
            Code.CAPACITY,
            f"input {name!r} has {len(samples)} samples ({len(samples) / rate:g} s), more than the"
            f" {longest} ({longest / rate:g} s) that this model takes at once: send it in parts",
        )
    if len(samples) < longest and spec.shorter == "last" and spec.lead is None and not last:
        raise RequestError(
            Code.BAD_SHAPE,
            f"input {name!r} has {len(samples)} samples, a request has {longest}: only the last"
            f" one, with END, may have fewer",
        )
    if samples.is_floating_point():
        low, high = (bound.item() for bound in samples.aminmax())
        if not (low >= -MAX_LEVEL and high <= MAX_LEVEL):  # also where one is NaN
            raise RequestError(
                Code.VALUE_RANGE,
                f"input {name!r} has samples from {low:g} to {high:g}; expected numbers from -1 to"
                f" 1 (at most {MAX_LEVEL:g}): send integers in {AUDIO_INT16!r}",
            )
    return samples


def read_option(spec: TensorSpec, parameters: Mapping[str, Parameter]) -> Tensor:
    """The number of the value that a parameter has, int64 ``[1]``.

    Raises:
        RequestError: BAD_PARAMETER, the model does not have this value.
    """
    if spec.name not in parameters:
        return torch.zeros(1, dtype=torch.int64)
    value = BY_NAME[spec.name].parse(parameters[spec.name])
    name = str(value).lower() if isinstance(value, bool) else str(value)
    if name not in spec.choices:
        known = [choice for choice in spec.choices if choice]
        raise RequestError(
            Code.BAD_PARAMETER,
            f"parameter {spec.name!r} is {show(value)}; this model has {known}",
        )
    return torch.tensor([spec.choices.index(name)])


def cut_stream(
    buffered: Tensor, new: Tensor, chunk: int, *, ends: bool
) -> tuple[list[tuple[Tensor, int]], Tensor]:
    """Cut what a stream has not fed yet into chunks.

    Args:
        buffered: samples from before, fewer than a chunk.
        new: those of a request.
        chunk: samples of a chunk.
        ends: the stream ends: what is left is a chunk too, with zeros behind it.

    Returns:
        Chunks ``[chunk]``, each with the number of its valid samples; and the samples that are
        left.
    """
    samples = torch.cat([buffered, new])
    whole = len(samples) // chunk * chunk
    chunks = [(samples[begin : begin + chunk], chunk) for begin in range(0, whole, chunk)]
    rest = samples[whole:]
    if ends and len(rest):
        chunks.append((torch.nn.functional.pad(rest, (0, chunk - len(rest))), len(rest)))
        rest = rest[:0]
    return chunks, rest.clone()
