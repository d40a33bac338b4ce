"""config.pbtxt compared with the manifest: what an operator may change, and what cannot work."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from inplace.errors import LoadError
from inplace.schema.programs import Program
from inplace.schema.specs import Dtype, Role, TensorSpec
from inplace.server.model_config import ServerTensor, check_model_config, model_tensors
from inplace.server.trust import TRUST_MODELS, trusted_folders
from support.models import RECTANGULAR

DECODER = Program(
    name="step",
    row_layout="packed",
    inputs=(TensorSpec(name="input_ids", role=Role.TOKENS, dtype=Dtype.INT64, shape=(-1,)),),
    outputs=(
        TensorSpec(
            name="next_token", role=Role.TOKEN, dtype=Dtype.INT64, shape=(1,), argmax_of="logits"
        ),
        TensorSpec(name="logits", role=Role.LOGITS, dtype=Dtype.FLOAT32, shape=(100,)),
    ),
    aliases=(),
    max_rows=4,
    chunk=8,
)
TENSORS = model_tensors(DECODER, generates=True, has_tokenizer=True, streams=True)

Config = dict[str, Any]


def entry(tensor: ServerTensor) -> Config:
    """A tensor as Triton passes it."""
    return {
        "name": tensor.name,
        "data_type": tensor.type,
        "dims": [str(extent) for extent in tensor.dims],
        "allow_ragged_batch": tensor.ragged,
        "optional": tensor.optional,
    }


CONFIG: Config = {
    "input": [entry(tensor) for tensor in TENSORS.inputs],
    "output": [entry(tensor) for tensor in TENSORS.outputs],
    "batch_input": [],
    "batch_output": [],
    "sequence_batching": {
        "oldest": {"max_candidate_sequences": 16384},
        "control_input": [],
        "state": [],
        "max_sequence_idle_microseconds": "60000000",
    },
}


def tensor(config: Config, kind: str, name: str) -> Config:
    [entry] = [each for each in config[kind] if each["name"] == name]
    result: Config = entry
    return result


def check(*changes: Callable[[Config], object], idle: float = 60.0) -> None:
    config = copy.deepcopy(CONFIG)
    for change in changes:
        change(config)
    check_model_config(config, TENSORS, idle)


def batching(config: Config) -> Config:
    result: Config = config["sequence_batching"]
    return result


ALLOWED: dict[str, Callable[[Config], object]] = {
    "nothing": lambda c: None,
    "instances": lambda c: c.update(instance_group=[{"count": 3, "kind": "KIND_CPU"}]),
    "warm-up": lambda c: c.update(model_warmup=[{"name": "w", "batch_size": 1}]),
    "priorities": lambda c: batching(c)["oldest"].update(max_queue_delay_microseconds=9),
    "candidates": lambda c: batching(c)["oldest"].update(max_candidate_sequences=40),
    "a longer idle time": lambda c: batching(c).update(max_sequence_idle_microseconds=10**9),
    "another order": lambda c: (c["input"].reverse(), c["output"].reverse()),
    "no ragged batches": lambda c: tensor(c, "input", "input_ids").update(allow_ragged_batch=False),
    "no stop texts": lambda c: c["input"].remove(tensor(c, "input", "stop")),
    "a disabled cache": lambda c: c.update(response_cache={"enable": False}),
}

REFUSED: dict[str, tuple[Callable[[Config], object], str]] = {
    "a renamed output": (
        lambda c: tensor(c, "output", "logits").update(name="scores"),
        "output scores is not one of the engine's outputs ['next_token', 'logits', 'tokens', "
        "'text_output', 'finish_reason', 'reused_tokens']; output logits is missing",
    ),
    "a missing output": (
        lambda c: c["output"].remove(tensor(c, "output", "tokens")),
        "output tokens is missing",
    ),
    "a renamed input": (
        lambda c: tensor(c, "input", "input_ids").update(name="ids"),
        "input ids is not one of the engine's inputs ['input_ids', 'text', 'stop']",
    ),
    "another type": (
        lambda c: tensor(c, "input", "input_ids").update(data_type="TYPE_INT32"),
        "input input_ids is TYPE_INT32, the engine's is TYPE_INT64",
    ),
    "other dims": (
        lambda c: tensor(c, "output", "logits").update(dims=[99]),
        "output logits has dims [99], the engine's are [100]",
    ),
    "a reshape": (
        lambda c: tensor(c, "output", "next_token").update(reshape={"shape": []}),
        "output next_token has a reshape",
    ),
    "an input that is not optional": (
        lambda c: tensor(c, "input", "text").update(optional=False),
        "input text is not optional",
    ),
    "an idle time below the backend's": (
        lambda c: batching(c).update(max_sequence_idle_microseconds=59_999_999),
        "max_sequence_idle_microseconds is 59999999, below the backend's idle_timeout_seconds 60",
    ),
    "Triton's default idle time": (
        lambda c: batching(c).pop("max_sequence_idle_microseconds"),
        "max_sequence_idle_microseconds is 1000000, below the backend's idle_timeout_seconds 60",
    ),
    "another strategy": (
        lambda c: batching(c).update(direct=batching(c).pop("oldest")),
        "sequence_batching has the strategy direct, the backend needs oldest",
    ),
    "control inputs": (
        lambda c: batching(c)["control_input"].append({"name": "START"}),
        "sequence_batching has the control_input ['START']",
    ),
    "states of Triton's": (
        lambda c: batching(c)["state"].append({"input_name": "keys"}),
        "sequence_batching has the state ['keys']",
    ),
    "iterations": (
        lambda c: batching(c).update(iterative_sequence=True),
        "sequence_batching has iterative_sequence",
    ),
    "a response cache": (
        lambda c: c.update(response_cache={"enable": True}),
        "response_cache would answer a request without a step of its sequence",
    ),
    "a batch input": (
        lambda c: c["batch_input"].append({"kind": "BATCH_ELEMENT_COUNT"}),
        "batch_input is not used by this backend",
    ),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_what_is_the_operators_loads(name: str) -> None:
    check(ALLOWED[name])


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_named(name: str) -> None:
    change, text = REFUSED[name]
    with pytest.raises(LoadError) as error:
        check(change)
    assert str(error.value).startswith(f"config.pbtxt does not fit the engine: {text}")
    assert str(error.value).endswith("change it back, or build the model again to restore it")


def test_all_differences_are_in_one_error() -> None:
    together = [REFUSED[name] for name in ("a renamed output", "another type", "another strategy")]
    with pytest.raises(LoadError) as error:
        check(*(change for change, _ in together))
    for _, text in together:
        assert text in str(error.value)


def test_a_step_model_has_no_generation_and_needs_each_input() -> None:
    tensors = model_tensors(RECTANGULAR, generates=False, has_tokenizer=False, streams=False)
    assert tensors.inputs == (ServerTensor("value", "TYPE_FP32", (4,)),)
    with pytest.raises(LoadError, match="input value is missing"):
        check_model_config({"sequence_batching": {}}, tensors, 1.0)


# --- whose plans are loaded ---


def process(proc: Path, *words: str) -> Path:
    """A process directory of a server with this command line, in the folder ``/srv``."""
    (proc / "7").mkdir(parents=True)
    (proc / "7" / "cmdline").write_bytes("\0".join(("tritonserver", *words, "")).encode())
    (proc / "7" / "cwd").symlink_to("/srv")
    return proc


@pytest.mark.parametrize(
    ("words", "folders"),
    [
        (("--model-repository=/models",), ["/models"]),
        (("--model-repository", "/models", "--log-verbose=1"), ["/models"]),
        (("--model-store=models", "--model-repository=/more"), ["/srv/models", "/more"]),
        (("--model-repository",), []),
        (("--http-port=1", "--model-repositories=/x"), []),
    ],
)
def test_the_repositories_of_the_servers_command_line_are_trusted(
    tmp_path: Path, words: tuple[str, ...], folders: list[str]
) -> None:
    proc = process(tmp_path, *words)
    assert trusted_folders(7, {}, proc) == tuple(map(Path, folders))


def test_the_environment_names_other_folders_and_an_unknown_server_none(tmp_path: Path) -> None:
    proc = process(tmp_path, "--model-repository=/models")
    assert trusted_folders(7, {TRUST_MODELS: "/a:/b"}, proc) == (Path("/a"), Path("/b"))
    assert trusted_folders(7, {TRUST_MODELS: ""}, proc) == ()
    assert trusted_folders(8, {}, proc) == ()
