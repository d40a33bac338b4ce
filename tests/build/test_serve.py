"""The models that ``serve`` writes, step and stream with its proxy, read back as Triton does."""

from pathlib import Path

import pytest
from google.protobuf import text_format
from inplace.schema.proxy import ProxyFile
from inplace.server.settings import MAX_WAITING
from inplace_builder.errors import BuildError
from inplace_builder.served.build import write_engine
from inplace_builder.served.decoder import build_decoder
from inplace_builder.served.options import BuildOptions
from support.models import CAPACITY, CHUNK, VOCABULARY, accumulator, tiny_llama
from support.vocabulary import save_tokenizer
from tritonclient.grpc import model_config_pb2 as pb

pytestmark = pytest.mark.slow

STREAM = BuildOptions(
    slots=2, max_rows=2, capacity=CAPACITY, chunk=CHUNK, idle_timeout=30.0, serve="stream"
)
LOGPROBS = [
    ("token_logprobs", pb.TYPE_FP32, [-1]),
    ("top_logprobs", pb.TYPE_FP32, [-1, -1]),
    ("top_tokens", pb.TYPE_INT64, [-1, -1]),
]
GENERATED = [
    ("tokens", pb.TYPE_INT64, [-1]),
    ("text_output", pb.TYPE_STRING, [1]),
    ("finish_reason", pb.TYPE_STRING, [1]),
]


def parsed(model: Path) -> pb.ModelConfig:
    return text_format.Parse((model / "config.pbtxt").read_text(), pb.ModelConfig())


def outputs(config: pb.ModelConfig) -> list[tuple[str, int, list[int]]]:
    return [(tensor.name, tensor.data_type, list(tensor.dims)) for tensor in config.output]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source")
    tiny_llama(source, eos_token_id=[2, 5])
    save_tokenizer(source)
    model = tmp_path_factory.mktemp("repository") / "llama"
    build_decoder(source, model, STREAM)
    return model


def test_a_stream_model_is_decoupled_and_takes_text_or_ids(built: Path) -> None:
    config = parsed(built)
    assert config.model_transaction_policy.decoupled
    assert [
        (t.name, t.data_type, list(t.dims), t.optional, t.allow_ragged_batch) for t in config.input
    ] == [
        ("input_ids", pb.TYPE_INT64, [-1], True, True),
        ("text", pb.TYPE_STRING, [1], True, True),
        ("stop", pb.TYPE_STRING, [-1], True, True),
    ]
    assert outputs(config) == [
        ("next_token", pb.TYPE_INT64, [1]),
        ("logits", pb.TYPE_FP32, [VOCABULARY]),
        *LOGPROBS,
        *GENERATED,
        ("reused_tokens", pb.TYPE_INT64, [1]),
    ]
    assert {name: value.string_value for name, value in config.parameters.items()} == {
        "serve": "stream",
        "idle_timeout_seconds": "30",
        "eos_token_ids": "2,5",
        "generation_queue": str(MAX_WAITING),
    }
    batching = config.sequence_batching
    assert batching.oldest.max_queue_delay_microseconds == 0  # the backend makes its batches itself
    assert (
        batching.max_sequence_idle_microseconds == (30 + 3600) * 10**6
    )  # Triton's clock runs while a generation does
    assert batching.oldest.max_candidate_sequences > STREAM.slots + MAX_WAITING


def test_its_proxy_has_no_sequences_and_passes_tensors_on_as_they_are(built: Path) -> None:
    proxy = built.with_name("llama_generate")
    config = parsed(proxy)
    assert (config.name, config.backend, config.max_batch_size) == ("llama_generate", "inplace", 1)
    assert config.model_transaction_policy.decoupled
    assert not config.HasField("sequence_batching")
    assert [(tensor.name, tensor.optional) for tensor in config.input] == [
        ("input_ids", True),
        ("text", True),
        ("stop", True),
        ("prompt", True),  # refused with the name of the input to use
        ("text_input", True),
    ]
    assert outputs(config) == GENERATED + LOGPROBS
    assert ProxyFile.load(proxy / "1") == ProxyFile(
        model="llama",
        has_tokenizer=True,
        has_logprobs=True,
        max_requests=STREAM.slots + MAX_WAITING,
    )


def test_a_model_that_does_not_generate_has_no_proxy_and_an_older_one_is_removed(
    tmp_path: Path, built: Path
) -> None:
    model = tmp_path / "sums"
    proxy = tmp_path / "sums_generate"
    options = BuildOptions(slots=4, max_rows=4, capacity=1, serve="stream")
    (proxy / "1").mkdir(parents=True)
    ProxyFile(model="sums", has_tokenizer=False, max_requests=1).save(proxy / "1")
    write_engine(accumulator(), model, options)
    assert not proxy.exists()
    assert [(tensor.name, tensor.optional) for tensor in parsed(model).input] == [("value", False)]
    assert [tensor.name for tensor in parsed(model).output] == ["sum", "values"]
    assert parsed(model).model_transaction_policy.decoupled


def test_a_proxy_of_another_model_is_left_alone(tmp_path: Path) -> None:
    proxy = tmp_path / "sums_generate"
    (proxy / "1").mkdir(parents=True)
    ProxyFile(model="other", has_tokenizer=False, max_requests=1).save(proxy / "1")
    write_engine(accumulator(), tmp_path / "sums", BuildOptions(slots=4, max_rows=4, capacity=1))
    assert ProxyFile.load(proxy / "1").model == "other"


def test_a_folder_that_is_not_a_proxy_is_never_replaced(tmp_path: Path) -> None:
    other = tmp_path / "llama_generate" / "notes.txt"
    other.parent.mkdir()
    other.write_text("mine")
    with pytest.raises(
        BuildError,
        match=r"llama_generate is a folder with other files.*; a stream model's generate proxy is",
    ):
        build_decoder(tmp_path / "nowhere", tmp_path / "llama", STREAM)
    assert other.read_text() == "mine"
    assert not (tmp_path / "llama").exists()


def test_an_unknown_protocol_is_refused() -> None:
    with pytest.raises(BuildError, match="serve is 'both'; choose step or stream"):
        BuildOptions(serve="both")  # type: ignore[arg-type]
