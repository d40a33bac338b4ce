"""Ways to damage a request of the tiny Llama or of the accumulator."""

import random
from collections.abc import Callable

import numpy as np
from fuzz.wire import Message, put
from support.models import VOCABULARY
from tritonclient.grpc import service_pb2 as pb

Damage = Callable[[Message, random.Random], None]

DTYPES = (
    "BOOL",
    "INT8",
    "INT32",
    "INT64",
    "UINT64",
    "FP16",
    "FP32",
    "FP64",
    "BYTES",
    "BF16",
    "FOO",
    "",
    "int64",
)
TEXTS = (
    "",
    "x",
    "-",
    "naïve ☃ \U0001f600",
    "new\nline",
    'quote"\\',
    "%s%n{}",
    "\x00\x01",
    "a" * 5000,
)
NUMBERS = (0, 1, -1, 7, 2**31, 2**32 + 7, 2**53 + 1, 2**63 - 1, -(2**63), 2**63, 2**64 - 1)
NAMES = (
    "logits",
    "temperature",
    "top_k",
    "top_p",
    "seed",
    "position",
    "max_tokens",
    "stream_interval",
    "ignore_eos",
    "sequence_key",
    "group",
    "add_special_tokens",
    "stop_token_ids",
    "fetch",
    "stream",
    "min_p",
    "timeout",
    "priority",
    "unheard of",
)
UNKNOWN = ("temprature", "max_new_tokens", "n", "stop")
"""Names that are not parameters, or not yet."""
SPECIAL_TEXTS = ("</s>", "<s>", "<unk>", "<s>x", "</s></s>", "<0xE4>")
CUT_TEXTS = (*"你ខ🙂é", "你好你好你好你好你好 x", "a ខ x", "\ufffd", "a\x00b")
"""Texts of several bytes a character, which byte-fallback tokenizers divide."""


def _fill(request: Message, values: list[int] | list[float], dtype: str = "INT64") -> None:
    kinds = {"INT64": np.int64, "FP32": np.float32}
    del request.inputs[1:]
    del request.raw_input_contents[1:]
    request.inputs[0].datatype = dtype
    request.inputs[0].shape[:] = [1, len(values)]
    request.raw_input_contents[0] = np.array(values, dtype=kinds[dtype]).tobytes()


def wrong_values(request: Message, rng: random.Random) -> None:
    """A token outside the vocabulary."""
    values = [rng.randrange(VOCABULARY) for _ in range(rng.randint(0, 4))]
    values.insert(rng.randint(0, len(values)), rng.choice((-1, VOCABULARY, 2**40, -(2**63))))
    _fill(request, values)


def no_values(request: Message, _: random.Random) -> None:
    _fill(request, [])


def too_many_values(request: Message, rng: random.Random) -> None:
    _fill(request, [1] * rng.choice((200, 1000, 50_000)))


def other_dtype(request: Message, rng: random.Random) -> None:
    request.inputs[0].datatype = rng.choice(
        [dtype for dtype in DTYPES if dtype != request.inputs[0].datatype]
    )


def other_shape(request: Message, rng: random.Random) -> None:
    """A shape that is not the model's, or not that of the bytes.

    The first extent is not 0: tritonserver 2.51 takes ``[0, n]`` for n rows, fails the whole batch
    where that is more than the model's
    rows, never answers ``[0, 0]``, and does not end on SIGTERM afterwards. No shape has 2**61
    elements or more: it takes 2**64 bytes for
    none, and the Python stub aborts (docs/failures.md).
    """
    count = len(request.raw_input_contents[0]) // 8
    wrong = [
        [],
        [count],
        [2, count],
        [1, count, 2],
        [1, count + 1],
        [1, -1],
        [-1, count],
        [1, 2**59],
        [2**40, 2**40],
    ]
    request.inputs[0].shape[:] = rng.choice(wrong)


def other_bytes(request: Message, rng: random.Random) -> None:
    content = request.raw_input_contents[0]
    request.raw_input_contents[0] = rng.choice((content[:-1], content + b"\x00", b""))


def fewer_contents(request: Message, _: random.Random) -> None:
    del request.raw_input_contents[:]


def other_input(request: Message, rng: random.Random) -> None:
    request.inputs[0].name = rng.choice(("slots", "", "INPUT_IDS", "logits", rng.choice(TEXTS)))


def no_input(request: Message, _: random.Random) -> None:
    del request.inputs[:]
    del request.raw_input_contents[:]


def more_inputs(request: Message, rng: random.Random) -> None:
    request.inputs.add(
        name=rng.choice(("slots", "write_indices", "x", *TEXTS)), datatype="INT64", shape=[1, 1]
    )
    request.raw_input_contents.append(bytes(8))


def unknown_output(request: Message, rng: random.Random) -> None:
    request.outputs.add(name=rng.choice(("cache", "input_ids", *TEXTS)))


def other_version(request: Message, rng: random.Random) -> None:
    request.model_version = rng.choice(("2", "-1", "x", "999999999999999999999"))


def shared_memory(request: Message, rng: random.Random) -> None:
    """Names a region that is not registered."""
    put_in = request.inputs[0].parameters
    put_in["shared_memory_region"].string_param = rng.choice(TEXTS) or "region"
    put_in["shared_memory_byte_size"].int64_param = rng.choice((0, 8, 2**62))
    del request.raw_input_contents[0]


def wrong_parameter(request: Message, rng: random.Random) -> None:
    """A value that the parameter cannot have, for the Llama."""
    name, value = rng.choice(
        (
            ("logits", "perhaps"),
            ("logits", 7),
            ("position", 10**6),
            ("position", "-1"),
            ("position", True),
            ("position", rng.choice(TEXTS)),
            ("temperature", "hot"),
            ("temperature", "-0.5"),
            ("temperature", "nan"),
            ("temperature", "1e999"),
            ("top_k", -1),
            ("top_k", VOCABULARY + 1),
            ("top_k", True),
            ("top_p", "0"),
            ("top_p", "1.5"),
            ("seed", str(2**63)),
            ("seed", "0x10"),
            ("position", "9" * 5000),
            ("temperature", float("nan")),
            ("ignore_eos", True),
            ("stream", False),
            ("sequence_key", "k" * 300),
        )
    )
    put(request, name, value)


def wrong_generation(request: Message, rng: random.Random) -> None:
    """Limits that a generation cannot have."""
    name, value = rng.choice(
        (
            ("max_tokens", rng.choice((0, -1, "0", "many", True, -(2**63)))),
            ("stream_interval", rng.choice((0, -3, "x", False))),
            ("ignore_eos", rng.choice(("perhaps", 7))),
            ("logits", True),
            ("stop_token_ids", rng.choice(("", "1,", "x", -1, "9" * 30, str(VOCABULARY)))),
            ("add_special_tokens", True),
        )
    )
    put(request, "max_tokens", 3)
    put(request, name, value)


def wrong_text(request: Message, rng: random.Random) -> None:
    """A text that is none, or not the only prompt."""
    request.inputs.add(name="text", datatype="BYTES", shape=[1, 1])
    word = b"\x04\x00\x00\x00word"
    wrong = (
        b"\x02\x00\x00\x00\xff\xfe",
        b"\xff\xff\xff\x7fword",
        b"\x04\x00",
        b"",
        word + word,
        b"\x00\x00\x00\x00",
    )
    if rng.random() < 0.8:
        del request.inputs[0], request.raw_input_contents[0]
        request.raw_input_contents.append(rng.choice(wrong))
    else:
        request.raw_input_contents.append(word)


def unknown_parameter(request: Message, rng: random.Random) -> None:
    """A name that no request has, with any value."""
    name = rng.choice((*UNKNOWN, "my-" + rng.choice(TEXTS)))
    put(request, name, rng.choice((True, 3, "text", 0.5)))


def unused_output(request: Message, rng: random.Random) -> None:
    """An output of the model that this kind of request does not have."""
    generates = "max_tokens" in request.parameters
    del request.outputs[:]
    request.outputs.add(name="next_token" if generates else rng.choice(("tokens", "finish_reason")))


REFUSED: dict[str, Damage] = {
    f.__name__: f
    for f in (
        wrong_values, no_values, too_many_values, other_dtype, other_shape, other_bytes,
        fewer_contents, other_input,
        no_input, more_inputs, unknown_output, other_version, shared_memory, wrong_parameter,
        wrong_generation, wrong_text, unknown_parameter, unused_output,
    )
}  # fmt: skip
"""After any one of these a request must be refused."""

NOT_FOR = {
    "llama": {"wrong_generation", "unused_output"},
    "stream": {"other_version"},
    "accumulator": {"wrong_generation", "wrong_parameter", "unused_output"},
}
"""Those that do not apply to a model, or that it need not refuse.

A request over a gRPC stream that names a model or a version which is
not there, after others that were answered, aborts tritonserver 2.51 ("ASSERTION FAILED:
!byte_buffer->Valid()" in its gRPC frontend).
"""


def tritons_parameter(request: Message, rng: random.Random) -> None:
    """A parameter that Triton itself knows and that has no effect here."""
    name, value = rng.choice((("timeout", 10**9), ("binary_data_output", True)))
    put(request, name, value)


def odd_id(request: Message, rng: random.Random) -> None:
    request.id = rng.choice([text for text in TEXTS if "\x00" not in text])


def typed_contents(request: Message, _: random.Random) -> None:
    """The same values in the message's typed field instead of as bytes."""
    tensor, content = request.inputs[0], request.raw_input_contents[0]
    if tensor.datatype == "INT64":
        tensor.contents.int64_contents.extend(np.frombuffer(content, np.int64).tolist())
    else:
        tensor.contents.fp32_contents.extend(np.frombuffer(content, np.float32).tolist())
    del request.raw_input_contents[:]


def named_outputs(request: Message, _: random.Random) -> None:
    generates = "max_tokens" in request.parameters
    request.outputs.add(
        name="sum"
        if request.model_name == "accumulator"
        else "tokens"
        if generates
        else "next_token"
    )


def more_contents(request: Message, rng: random.Random) -> None:
    """Bytes that no input claims; Triton ignores them."""
    if request.raw_input_contents:
        request.raw_input_contents.append(rng.randbytes(8))


HARMLESS: dict[str, Damage] = {
    f.__name__: f for f in (tritons_parameter, odd_id, typed_contents, named_outputs, more_contents)
}
"""After any one of these a request must be answered as before."""


def random_tensor(request: Message, rng: random.Random) -> None:
    """Any name, type, shape and bytes; see `other_shape` for the one that is left out."""
    del request.inputs[:]
    del request.raw_input_contents[:]
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        shape = [
            rng.choice((1, 1, 1, 2, 3, 4, 0, -1, 100))
            for _ in range(rng.choice((2, 2, 2, 0, 1, 3, 6)))
        ]
        shape[:1] = [shape[0] or 1] if shape else []
        name = rng.choice(("input_ids", "value", "slots", "", "text", "stop", "next_token"))
        request.inputs.add(name=name, datatype=rng.choice(DTYPES), shape=shape)
        count = int(np.prod([abs(extent) for extent in shape], dtype=np.int64))
        width = rng.choice((1, 4, 8, 8, 8))
        request.raw_input_contents.append(rng.randbytes(min(count, 10_000) * width))


def random_parameter(request: Message, rng: random.Random) -> None:
    kinds = (
        rng.choice(TEXTS),
        rng.choice(NUMBERS),
        rng.random() * 10 ** rng.randint(-300, 300),
        rng.random() < 0.5,
        float("nan"),
    )
    put(request, rng.choice((*NAMES, rng.choice(TEXTS))), rng.choice(kinds))


def valueless_parameter(request: Message, rng: random.Random) -> None:
    request.parameters[rng.choice((*NAMES, "sequence_id"))].CopyFrom(pb.InferParameter())


def _add_texts(request: Message, name: str, texts: list[str]) -> None:
    content = b"".join(len(text.encode()).to_bytes(4, "little") + text.encode() for text in texts)
    request.inputs.add(name=name, datatype="BYTES", shape=[1, len(texts)])
    request.raw_input_contents.append(content)


def odd_stop(request: Message, rng: random.Random) -> None:
    """Stop texts that are special tokens, contain one, or are parts of characters."""
    texts = rng.choices((*SPECIAL_TEXTS, *CUT_TEXTS, *TEXTS), k=rng.choice((1, 1, 2, 17)))
    _add_texts(request, "stop", texts)


def odd_text(request: Message, rng: random.Random) -> None:
    """A prompt of special tokens and characters of several bytes."""
    del request.inputs[:], request.raw_input_contents[:]
    parts = rng.choices((*SPECIAL_TEXTS, *CUT_TEXTS, "x"), k=rng.randint(1, 4))
    _add_texts(request, "text", ["".join(parts)])
    if rng.random() < 0.5:
        put(request, "add_special_tokens", rng.choice((True, "false", "x")))


def odd_flag(request: Message, rng: random.Random) -> None:
    put(
        request,
        rng.choice(("sequence_start", "sequence_end")),
        rng.choice((1, 0, "true", 1.0, 2**64 - 1)),
    )


def odd_sequence(request: Message, rng: random.Random) -> None:
    put(request, "sequence_id", rng.choice((*TEXTS, *NUMBERS, True, 1.5, "b" * 129)))


def no_sequence(request: Message, _: random.Random) -> None:
    for name in ("sequence_id", "sequence_start", "sequence_end"):
        if name in request.parameters:
            del request.parameters[name]


def other_model(request: Message, rng: random.Random) -> None:
    request.model_name = rng.choice(("llama", "accumulator", "stream", "nothing", *TEXTS))


ANY: dict[str, Damage] = (
    REFUSED
    | HARMLESS
    | {
        f.__name__: f
        for f in (
            random_tensor,
            random_parameter,
            valueless_parameter,
            odd_stop,
            odd_text,
            odd_flag,
            odd_sequence,
            no_sequence,
            other_model,
        )
    }
)
"""All of them; whether a request is refused after several depends."""


def damaged(request: Message, rng: random.Random, *, over_stream: bool) -> list[str]:
    """Damage a request one to three times; returns how. A way that no longer applies is skipped."""
    done = []
    ways = set(ANY) - ({"other_version", "other_model"} if over_stream else set())
    for name in rng.sample(sorted(ways), rng.choice((1, 1, 1, 2, 3))):
        try:
            ANY[name](request, rng)
        except (IndexError, ValueError):  # an earlier way has removed what this one would change
            continue
        done.append(name)
    return done
