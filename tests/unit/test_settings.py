"""The settings of config.pbtxt, as Triton passes them."""

import json
import logging
from typing import Any

import pytest
from inplace.errors import LoadError
from inplace.schema.prefixes import PrefixOptions
from inplace.schema.served import Manifest
from inplace.schema.snapshots import SnapshotOptions
from inplace.schema.specs import Dtype, Role, TensorSpec
from inplace.server.settings import MAX_WAITING, Settings
from support.models import LOADABLE


def eos(ids: str) -> dict[str, Any]:
    return {"eos_token_ids": {"string_value": ids}}


def parse(
    idle: str | None = None,
    triton_idle: object = None,
    manifest: Manifest = LOADABLE,
    **changes: object,
) -> Settings:
    """Parse a configuration as the builder writes it, with changes; None removes a key."""
    config: dict[str, Any] = {
        "max_batch_size": 4,
        "sequence_batching": {"oldest": {"max_candidate_sequences": 8}},
        "model_transaction_policy": {"decoupled": False},
        "parameters": {"EXECUTION_ENV_PATH": {"string_value": "env"}},
    }
    if idle is not None:
        config["parameters"]["idle_timeout_seconds"] = {"string_value": idle}
    if triton_idle is not None:
        config["sequence_batching"]["max_sequence_idle_microseconds"] = triton_idle
    config |= changes
    return Settings.parse(
        json.dumps({key: value for key, value in config.items() if value is not None}), manifest
    )


def test_the_default_idle_timeout_is_600_seconds() -> None:
    assert parse() == Settings(600.0)
    assert parse(parameters=None) == Settings(600.0)
    assert parse(model_transaction_policy=None) == Settings(600.0)


@pytest.mark.parametrize(
    ("text", "expected"), [("30", 30.0), ("1", 1.0), ("2.5", 2.5), ("1e3", 1000.0)]
)
def test_the_idle_timeout_is_taken_as_written(text: str, expected: float) -> None:
    assert parse(text) == Settings(expected)


@pytest.mark.parametrize(
    "triton_idle", [5_000_000, "5000000"]
)  # Triton's JSON has 64-bit numbers as text
def test_the_idle_timeout_is_never_below_tritons_own_and_a_note_says_so(
    triton_idle: object,
) -> None:
    settings = parse("2.5", triton_idle)
    assert settings.idle_timeout == 5.0
    assert settings.notes == (
        "idle_timeout_seconds 2.5 is below Triton's own max_sequence_idle_microseconds 5000000; "
        "using 5 s",
    )
    assert parse("5", triton_idle) == Settings(5.0)
    assert parse("5.5", triton_idle) == Settings(5.5)


@pytest.mark.parametrize("triton_idle", [None, 0, "0"])
def test_tritons_default_idle_time_is_one_second(triton_idle: object) -> None:
    assert parse("0.5", triton_idle).idle_timeout == 1.0
    assert "max_sequence_idle_microseconds 1000000; using 1 s" in parse("0.5", triton_idle).notes[0]


@pytest.mark.parametrize("text", ["0", "-1", "soon", "", "nan", "inf", "-inf", "1e999"])
def test_an_invalid_idle_timeout_is_a_load_error(text: str) -> None:
    with pytest.raises(LoadError) as error:
        parse(text)
    assert (
        str(error.value) == f"config.pbtxt: parameter idle_timeout_seconds is {text!r}; "
        "expected a number of seconds above 0"
    )


@pytest.mark.parametrize(
    ("serve", "decoupled"), [("step", True), ("stream", False), ("stream", None)]
)
def test_a_protocol_that_does_not_fit_the_transaction_policy_is_refused(
    serve: str, decoupled: bool | None
) -> None:
    with pytest.raises(
        LoadError,
        match=rf"has decoupled: {str(bool(decoupled)).lower()} and serve: {serve}; only stream",
    ):
        parse(
            parameters={"serve": {"string_value": serve}},
            model_transaction_policy={} if decoupled is None else {"decoupled": decoupled},
        )
    assert parse(model_transaction_policy={}) == Settings(600.0)


def test_a_stream_model_has_end_tokens_a_queue_and_an_idle_timeout_of_its_own() -> None:
    texts = {
        "serve": "stream",
        "eos_token_ids": "0, 2",
        "generation_queue": "5",
        "idle_timeout_seconds": "2",
    }
    parameters = {name: {"string_value": value} for name, value in texts.items()}
    decoupled = {"decoupled": True}
    settings = parse(
        triton_idle=3602_000_000, parameters=parameters, model_transaction_policy=decoupled
    )
    assert settings == Settings(2.0, "stream", frozenset({0, 2}), 5)
    parameters = {"serve": {"string_value": "stream"}}
    assert parse(parameters=parameters, model_transaction_policy=decoupled) == Settings(
        600.0, "stream", frozenset(), MAX_WAITING
    )


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "serve",
            "both",
            r"parameter serve is 'both'; expected one of \['step', 'stream', 'front'\]",
        ),
        (
            "eos_token_ids",
            "2;3",
            "parameter eos_token_ids is '2;3'; expected whole numbers .*, separated by commas",
        ),
        ("generation_queue", "-1", "parameter generation_queue is '-1'; expected whole numbers"),
        (
            "generation_queue",
            "5,7",
            "parameter generation_queue is '5,7'; expected one whole number of at least 0",
        ),
        ("prefix_reuse", "yes", "parameter prefix_reuse is 'yes'; expected on or off"),
        ("prefix_reuse_seconds", "0", "prefix_reuse_seconds is '0'; expected a number of seconds"),
        (
            "idle_timeout_second",
            "5",
            r"has the parameters \['idle_timeout_second'\], which .* takes \['serve', 'idle",
        ),
    ],
)
def test_an_invalid_setting_is_a_load_error(name: str, text: str, message: str) -> None:
    with pytest.raises(LoadError, match=message):
        parse(parameters={name: {"string_value": text}})


def test_end_tokens_beyond_the_vocabulary_are_a_load_error() -> None:
    outputs = (
        TensorSpec(name="logits", role=Role.LOGITS, dtype=Dtype.FLOAT32, shape=(100,)),
        TensorSpec(
            name="token", role=Role.TOKEN, dtype=Dtype.INT64, shape=(1,), sampled_from="logits"
        ),
    )
    step = LOADABLE.programs[0].model_copy(update={"outputs": outputs})
    manifest = LOADABLE.model_copy(update={"programs": (step,)})
    assert parse(parameters=eos("0,99"), manifest=manifest).eos == {0, 99}
    with pytest.raises(
        LoadError, match="parameter eos_token_ids is '0,100'; expected token ids below 100"
    ):
        parse(parameters=eos("0,100"), manifest=manifest)


def test_a_model_without_sequence_batching_is_refused() -> None:
    for changes in (
        '{"sequence_batching": null}',
        '{"sequence_batching": null, "dynamic_batching": {}}',
    ):
        with pytest.raises(
            LoadError, match=r"config.pbtxt has no sequence_batching: this backend serves sequences"
        ):
            parse(**json.loads(changes))


@pytest.mark.parametrize(
    ("size", "fits"), [(1, True), (4, True), (0, False), (5, False), (64, False)]
)
def test_a_batch_the_engine_was_not_built_for_is_refused(size: int, fits: bool) -> None:
    if fits:
        assert parse(max_batch_size=size) == Settings(600.0)
        return
    with pytest.raises(
        LoadError,
        match=rf"has max_batch_size {size}, the engine was built for 1 to 4 rows a step",
    ):
        parse(max_batch_size=size)


def test_the_default_log_level_is_info_and_an_unknown_level_is_refused() -> None:
    assert parse().log_level == logging.INFO
    assert parse(parameters={"log_level": {"string_value": "debug"}}).log_level == logging.DEBUG
    with pytest.raises(
        LoadError,
        match=r"parameter log_level is 'verbose'; expected one of \['debug', 'info', 'warning'",
    ):
        parse(parameters={"log_level": {"string_value": "verbose"}})


def test_a_capacity_is_taken_as_written() -> None:
    assert parse().capacity is None
    assert parse(parameters={"capacity": {"string_value": "512"}}).capacity == 512
    with pytest.raises(LoadError, match="parameter capacity is '-1'; expected whole numbers"):
        parse(parameters={"capacity": {"string_value": "-1"}})


def test_sequences_are_stored_only_where_the_operator_says_so() -> None:
    def settings(**values: str) -> Settings:
        return parse(parameters={name: {"string_value": text} for name, text in values.items()})

    place = {"snapshot_store": "file:///store", "snapshot_secret_file": "/secret"}
    assert settings().snapshots is None
    assert settings(**place).snapshots == SnapshotOptions("file:///store", "/secret")
    others = {"snapshot_every": "64", "snapshot_seconds": "2.5", "snapshot_quota_bytes": "1000"}
    expected = SnapshotOptions("file:///store", "/secret", 64, 2.5, 1000)
    assert settings(**place, **others).snapshots == expected
    with pytest.raises(LoadError, match="without snapshot_store: name the store"):
        settings(snapshot_every="64")
    with pytest.raises(LoadError, match="without snapshot_secret_file: name a file"):
        settings(snapshot_store="file:///store")
    with pytest.raises(LoadError, match="snapshot_every is 0; expected a number above 0"):
        settings(**place, snapshot_every="0")


def test_prefixes_are_reused_only_where_the_operator_says_so() -> None:
    def settings(**values: str) -> Settings:
        given = {name: {"string_value": value} for name, value in values.items()}
        return parse(parameters=given)

    assert settings().prefixes is None
    assert settings(prefix_reuse="off", prefix_reuse_slots="3").prefixes is None
    assert settings(prefix_reuse="on").prefixes == PrefixOptions(600.0, None, without_key=False)
    assert settings(
        prefix_reuse="on",
        prefix_reuse_seconds="2.5",
        prefix_reuse_slots="3",
        prefix_reuse_without_key="on",
    ).prefixes == PrefixOptions(2.5, 3, without_key=True)


def test_an_engine_is_shared_where_the_operator_says_so_and_it_has_an_effect() -> None:
    on = {"share_engine": {"string_value": "on"}}
    group = [{"count": 2, "kind": "KIND_CPU"}]
    assert not parse(instance_group=group).share_engine
    shared = parse(parameters=on, instance_group=group)
    assert (shared.share_engine, shared.notes) == (True, ())
    [note] = parse(parameters=on, instance_group=[{"count": 1}, {"count": 1}]).notes
    assert "no instance_group has a count above 1" in note
    with pytest.raises(LoadError, match="share_engine is 'yes'; expected on or off"):
        parse(parameters={"share_engine": {"string_value": "yes"}}, instance_group=group)
