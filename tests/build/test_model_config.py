"""config.pbtxt, read back as Triton reads it."""

import pytest
from google.protobuf import json_format, text_format
from inplace.server.settings import IDLE_TIMEOUT, SERVE, num_instances
from inplace_builder.served.model_config import MAX_CANDIDATE_SEQUENCES, ModelConfig
from support.models import BRIEF_IDLE, SLOTS, VOCABULARY, Repository
from tritonclient.grpc import model_config_pb2 as pb


def parsed(repository: Repository, name: str) -> pb.ModelConfig:
    return text_format.Parse(
        (repository.path / name / "config.pbtxt").read_text(), pb.ModelConfig()
    )


@pytest.fixture
def llama(repository: Repository) -> pb.ModelConfig:
    return parsed(repository, "llama")


def test_a_decoder_takes_one_ragged_input_of_token_ids(llama: pb.ModelConfig) -> None:
    [ids] = llama.input
    assert (ids.name, ids.data_type, list(ids.dims), ids.allow_ragged_batch) == (
        "input_ids",
        pb.TYPE_INT64,
        [-1],
        True,
    )


def test_a_decoder_gives_the_next_token_and_its_logits(llama: pb.ModelConfig) -> None:
    assert [(out.name, out.data_type, list(out.dims)) for out in llama.output] == [
        ("next_token", pb.TYPE_INT64, [1]),
        ("logits", pb.TYPE_FP32, [VOCABULARY]),
        ("token_logprobs", pb.TYPE_FP32, [-1]),
        ("top_logprobs", pb.TYPE_FP32, [-1, -1]),
        ("top_tokens", pb.TYPE_INT64, [-1, -1]),
    ]


def test_no_control_input_and_no_state_crosses_the_server(llama: pb.ModelConfig) -> None:
    assert list(llama.sequence_batching.control_input) == []
    assert list(llama.sequence_batching.state) == []


def test_the_batch_is_the_program_s_rows_and_the_model_is_not_decoupled(
    llama: pb.ModelConfig,
) -> None:
    assert (llama.name, llama.backend, llama.max_batch_size) == ("llama", "inplace", SLOTS)
    assert not llama.model_transaction_policy.decoupled


def test_sequences_are_batched_oldest_with_far_more_candidates_than_slots(
    llama: pb.ModelConfig,
) -> None:
    assert llama.sequence_batching.WhichOneof("strategy_choice") == "oldest"
    assert (
        llama.sequence_batching.oldest.max_candidate_sequences
        == MAX_CANDIDATE_SEQUENCES
        > 100 * SLOTS
    )
    assert llama.sequence_batching.oldest.max_queue_delay_microseconds == 20_000


def test_the_idle_timeout_reaches_the_server_and_the_backend(
    repository: Repository, llama: pb.ModelConfig
) -> None:
    assert llama.sequence_batching.max_sequence_idle_microseconds == 600_000_000
    assert {key: value.string_value for key, value in llama.parameters.items()} == {
        IDLE_TIMEOUT: "600",
        SERVE: "step",
    }
    brief = parsed(repository, "brief")
    assert brief.sequence_batching.max_sequence_idle_microseconds == int(BRIEF_IDLE * 1e6)
    assert {key: value.string_value for key, value in brief.parameters.items()} == {
        IDLE_TIMEOUT: f"{BRIEF_IDLE:g}",
        SERVE: "step",
    }
    assert (brief.max_batch_size, brief.sequence_batching.oldest.max_candidate_sequences) == (
        2,
        MAX_CANDIDATE_SEQUENCES,
    )


def test_one_instance_on_the_cpu(llama: pb.ModelConfig) -> None:
    assert [(group.kind, group.count) for group in llama.instance_group] == [
        (pb.ModelInstanceGroup.KIND_CPU, 1)
    ]


def test_a_rectangular_model_has_no_ragged_input(repository: Repository) -> None:
    config = parsed(repository, "accumulator")
    assert [
        (tensor.name, tensor.data_type, list(tensor.dims), tensor.allow_ragged_batch)
        for tensor in config.input
    ] == [("value", pb.TYPE_FP32, [4], False)]
    assert [(tensor.name, tensor.data_type, list(tensor.dims)) for tensor in config.output] == [
        ("sum", pb.TYPE_FP32, [4]),
        ("values", pb.TYPE_INT32, [1]),
    ]


@pytest.mark.parametrize(
    ("device", "gpus", "total"), [("cpu", (), 2), ("cuda", (), 2), ("cuda", (0, 3), 4)]
)
def test_an_instance_group_names_the_gpus(device: str, gpus: tuple[int, ...], total: int) -> None:
    """Without names Triton fills in all that it sees, before a backend gets the configuration."""
    config = ModelConfig(
        name="model",
        max_batch_size=1,
        inputs=(),
        outputs=(),
        sequence_batching=None,
        decoupled=False,
        device=device,
        parameters={},
        instances=2,
        gpus=gpus,
    ).proto()
    [group] = config.instance_group
    assert (group.count, tuple(group.gpus)) == (2, gpus)
    assert (group.kind == pb.ModelInstanceGroup.KIND_GPU) is (device == "cuda")
    assert (
        num_instances(json_format.MessageToJson(config, preserving_proto_field_name=True)) == total
    )
