"""The manifest: written and read back, and refused with the reason."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from inplace.errors import LoadError
from inplace.schema.artifacts import EngineFile
from inplace.schema.files import FileRecord, digest_of
from inplace.schema.programs import CompiledProgram, Program
from inplace.schema.schedule import Call, Loop, Schedule
from inplace.schema.served import FILE_NAME, Manifest
from inplace.schema.specs import Alias, Dtype, Lowering, Role, StateSpec, TensorSpec, Update
from inplace.schema.standalone import StandaloneManifest
from pydantic import ValidationError
from support.manifests import save

CACHE = StateSpec(
    name="cache", shape=(2, 16, 4), dtype=Dtype.BFLOAT16, update=Update.APPEND, axis=1, reset=False
)
CELL = StateSpec(name="cell", shape=(3,), dtype=Dtype.FLOAT32, update=Update.REPLACE, fill=-1.5)
WINDOW = StateSpec(name="window", shape=(5,), dtype=Dtype.INT32, update=Update.RING, axis=0)

TOKENS = TensorSpec(
    name="ids", role=Role.TOKENS, dtype=Dtype.INT64, shape=(-1,), minimum=0, maximum=99
)
SCALE = TensorSpec(name="scale", role=Role.ROW, dtype=Dtype.FLOAT32, shape=(3,))
SLOTS = TensorSpec(name="slots", role=Role.SLOTS, dtype=Dtype.INT32)
TOKEN = TensorSpec(name="token", role=Role.TOKEN, dtype=Dtype.INT64, shape=(1,), argmax_of="logits")
LOGITS = TensorSpec(
    name="logits", role=Role.LOGITS, dtype=Dtype.FLOAT32, shape=(100,), on_request=True
)
DONE = TensorSpec(name="done", role=Role.DONE, dtype=Dtype.BOOL, shape=(1,))

STEP = CompiledProgram(
    name="step",
    row_layout="packed",
    inputs=(TOKENS, SCALE, SLOTS),
    outputs=(TOKEN, LOGITS),
    aliases=(Alias(output="cache_updated", input="cache", kind="operator"),),
    max_rows=4,
    chunk=8,
    states=("cache", "cell", "window"),
    read_only=("cell", "window"),
    engine=EngineFile(file="engine.safetensors", kind="torch", device="cpu", dtype=Dtype.BFLOAT16),
    lowering=(Lowering(state="cache", kind="operator", reason="it can"),),
)

MANIFEST = Manifest(
    name="model",
    slots=4,
    capacity=16,
    states=(CACHE, CELL, WINDOW),
    programs=(STEP,),
    files=(FileRecord(name="engine.safetensors", bytes=12, sha256="0" * 64),),
    verified="executed",
    built_with={"torch": "2"},
)


def changed(spec: StateSpec | TensorSpec | Program | Manifest, **values: object) -> dict[str, Any]:
    """The fields of a record with these changes, for the constructor to check."""
    return {name: getattr(spec, name) for name in type(spec).model_fields} | values


# --- the file ---


def test_a_saved_manifest_loads_as_it_was(tmp_path: Path) -> None:
    MANIFEST.save(tmp_path)
    loaded = Manifest.load(tmp_path)
    assert loaded == MANIFEST
    loaded.save(tmp_path)
    with pytest.raises(
        ValidationError, match="the manifest must have a capacity, because states append"
    ):
        Manifest(**changed(MANIFEST, capacity=None))


def test_a_file_has_the_field_names_of_its_version_and_no_others(tmp_path: Path) -> None:
    MANIFEST.save(tmp_path)
    fields = json.loads((tmp_path / FILE_NAME).read_text())
    [lowering] = fields["programs"][0]["lowering"]
    assert list(lowering) == ["state", "kind", "reason", "refused"]
    lowering["because"] = lowering.pop("reason")
    save(tmp_path, fields)
    with pytest.raises(
        LoadError, match=r"is damaged \(programs.0.lowering.0.reason: Field required\)"
    ):
        Manifest.load(tmp_path)


@pytest.mark.parametrize("fill", [float("inf"), float("-inf")])
def test_an_infinite_fill_survives_the_file(tmp_path: Path, fill: float) -> None:
    states = (StateSpec(**changed(CACHE, fill=fill)), CELL, WINDOW)
    Manifest(**changed(MANIFEST, states=states)).save(tmp_path)
    assert Manifest.load(tmp_path).states[0].fill == fill


def test_a_missing_file_names_the_folder_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(LoadError) as error:
        Manifest.load(tmp_path / "nowhere")
    path = tmp_path / "nowhere" / FILE_NAME
    assert str(error.value) == (
        f"{path} does not exist: {path.parent} is not an engine directory; "
        "build one with `inplace build`, or from Python with `inplace_builder.build`"
    )


@pytest.mark.parametrize(
    ("file", "description"),
    [
        ("engine.json", "is an engine for a server; load it with `inplace serve`"),
        ("1/engine.json", "is an engine for a server"),
        (
            "standalone.json",
            "is an engine that is called without a server; load it with `inplace.load`",
        ),
        ("proxy.json", "is the generate proxy of a stream model"),
        ("direct.json", "is an engine of an older version, which is not read any more; build it"),
        ("front.json", "is the generate proxy of an older version, which is not read any more"),
    ],
)
def test_a_folder_of_another_kind_is_refused_with_what_it_is(
    tmp_path: Path, file: str, description: str
) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    record = StandaloneManifest if "engine" in file else Manifest
    with pytest.raises(LoadError, match=re.escape(f"does not exist: {tmp_path} {description}")):
        record.load(tmp_path)


def test_a_file_that_cannot_be_read_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).mkdir()
    with pytest.raises(LoadError, match=rf"{FILE_NAME} is not a regular file inside its folder"):
        Manifest.load(tmp_path)
    (tmp_path / FILE_NAME).rmdir()
    (tmp_path / FILE_NAME).write_bytes(b"\xff\xfe{}")
    with pytest.raises(LoadError, match=rf"{FILE_NAME} is not a manifest .*'utf-8' codec"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize("version", [0, 1, 17])
def test_another_version_names_both_versions(tmp_path: Path, version: int) -> None:
    fields = json.loads(MANIFEST.model_dump_json()) | {
        "manifest_version": version,
        "field_of_the_future": 1,
    }
    (tmp_path / FILE_NAME).write_text(json.dumps(fields))
    with pytest.raises(
        LoadError,
        match=rf"has manifest version {version}, this runtime reads version 2: build the model "
        rf"again with `inplace build … --output {tmp_path.parent}`",
    ):
        Manifest.load(tmp_path)


def test_a_changed_manifest_is_refused_by_its_digest(tmp_path: Path) -> None:
    MANIFEST.save(tmp_path)
    fields = json.loads((tmp_path / FILE_NAME).read_text())
    recorded = fields["digest"]
    assert recorded == MANIFEST.digest
    fields["programs"][0]["outputs"].reverse()
    (tmp_path / FILE_NAME).write_text(json.dumps(fields))
    del fields["digest"]
    actual = digest_of(fields)
    with pytest.raises(LoadError) as error:
        Manifest.load(tmp_path)
    assert str(error.value).startswith(
        f"{tmp_path / FILE_NAME} has the digest {actual[:12]}…, it says {recorded[:12]}…: it was "
        "edited or damaged; build the model again with `inplace build"
    )


def test_a_field_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    MANIFEST.save(tmp_path)
    text = (tmp_path / FILE_NAME).read_text()
    (tmp_path / FILE_NAME).write_text('{"slots": 1,' + text[1:])
    with pytest.raises(LoadError, match=r"is not a manifest \(invalid JSON: it has 'slots' twice"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a manifest (invalid JSON: Expecting value"),
        ("not json", "is not a manifest (invalid JSON: Expecting value"),
        (MANIFEST.model_dump_json()[:-40], "is not a manifest (invalid JSON: "),
        ("[" * 100_000, "is not a manifest (invalid JSON: "),
        ("[]", "is not a manifest (it is not a JSON object)"),
        ("{}", "is not a manifest (it has no manifest_version)"),
        ('{"manifest_version": "x"}', "is not a manifest (it has no manifest_version)"),
        ('{"manifest_version": true}', "is not a manifest (it has no manifest_version)"),
        ('{"manifest_version": 2}', "has the digest "),
    ],
)
def test_damaged_json_names_the_damage(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / FILE_NAME).write_text(text)
    with pytest.raises(LoadError) as error:
        Manifest.load(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / FILE_NAME} {message}")
    assert str(error.value).endswith("with `inplace_builder.write_engine`")
    assert "\n" not in str(error.value)


def unknown(fields: dict[str, Any]) -> None:
    fields["surprise"] = 1


def unknown_inside(fields: dict[str, Any]) -> None:
    fields["states"][1]["surprise"] = 1


def without_slots(fields: dict[str, Any]) -> None:
    del fields["slots"]


def no_slots(fields: dict[str, Any]) -> None:
    fields["slots"] = 0


def no_rows(fields: dict[str, Any]) -> None:
    fields["programs"][0]["max_rows"] = 0


def no_such_dtype(fields: dict[str, Any]) -> None:
    fields["states"][0]["dtype"] = "float8"


def other_engine(fields: dict[str, Any]) -> None:
    fields["programs"][0]["engine"]["kind"] = "other"


def unverified(fields: dict[str, Any]) -> None:
    fields["verified"] = "hoped"


def stray_alias(fields: dict[str, Any]) -> None:
    fields["programs"][0]["aliases"][0]["input"] = "unknown"


def axis_outside(fields: dict[str, Any]) -> None:
    fields["states"][0]["axis"] = 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (unknown, "surprise: Extra inputs are not permitted"),
        (unknown_inside, "states.1.surprise: Extra inputs are not permitted"),
        (without_slots, "slots: Field required"),
        (no_slots, "slots: Input should be greater than or equal to 1"),
        (no_rows, "programs.0.max_rows: Input should be greater than or equal to 1"),
        (no_such_dtype, "states.0.dtype: Input should be 'bool', 'int8'"),
        (other_engine, "programs.0.engine.kind: Input should be 'torch'"),
        (unverified, "verified: Input should be 'executed'"),
        (
            stray_alias,
            "alias cache_updated@unknown@operator of program step names no state of this engine",
        ),
        (axis_outside, "state cache: axis 3 is outside its shape (2, 16, 4)"),
    ],
)
def test_a_wrong_field_is_named(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    fields = json.loads(MANIFEST.model_dump_json())
    change(fields)
    save(tmp_path, fields)
    with pytest.raises(LoadError) as error:
        Manifest.load(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / FILE_NAME} is damaged (")
    assert message in str(error.value)


# --- the records ---


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"axis": None}, "state cache: an axis belongs to append and ring, not to replace"),
        (
            {"update": Update.REPLACE},
            "state cache: an axis belongs to append and ring, not to replace",
        ),
        ({"axis": -1}, r"state cache: axis -1 is outside its shape \(2, 16, 4\)"),
        (
            {"axis": 3, "update": Update.RING},
            r"state cache: axis 3 is outside its shape \(2, 16, 4\)",
        ),
        ({"shape": (2, 0, 4)}, r"state cache: every extent of \(2, 0, 4\) must be at least 1"),
    ],
)
def test_an_inconsistent_state_is_a_value_error_that_names_it(
    values: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        StateSpec(**changed(CACHE, **values))


def renamed(spec: TensorSpec, **values: object) -> TensorSpec:
    return TensorSpec(**changed(spec, **values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"inputs": (TOKENS, renamed(SCALE, name="ids"))},
            r"step: tensor names must differ, got \['ids', 'ids', 'token', 'logits'\]",
        ),
        (
            {"outputs": (renamed(TOKEN, name="slots"), LOGITS)},
            "program step: tensor names must differ",
        ),
        (
            {"inputs": (TOKENS, SLOTS, renamed(SLOTS, name="again"))},
            "program step: more than one input has the role slots",
        ),
        (
            {"inputs": (SCALE, SLOTS)},
            "program step: a packed program needs an input with the role tokens",
        ),
        (
            {"row_layout": "rectangular"},
            "program step: a rectangular program takes one entry a row and a chunk of 1",
        ),
        (
            {"row_layout": "rectangular", "inputs": (SCALE, SLOTS)},
            "program step: a rectangular program takes one entry a row and a chunk of 1",
        ),
        (
            {"row_layout": "rectangular", "chunk": 1},
            "program step: a rectangular program takes one entry a row and a chunk of 1",
        ),
    ],
)
def test_an_inconsistent_program_is_a_value_error_that_names_it(
    values: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        CompiledProgram(**changed(STEP, **values))


def test_a_rectangular_program_of_one_entry_a_row_is_consistent() -> None:
    program = CompiledProgram(
        **changed(STEP, row_layout="rectangular", inputs=(SCALE, SLOTS), chunk=1)
    )
    assert program.client_inputs == (SCALE,)


def test_a_chunk_must_fit_into_an_empty_sequence() -> None:
    assert Manifest(**changed(MANIFEST, capacity=8)).capacity == 8
    with pytest.raises(ValueError, match="program step: a chunk of 8 tokens is longer than the "):
        Manifest(**changed(MANIFEST, capacity=7))


def test_a_program_must_name_states_of_the_engine_and_write_or_only_read_each() -> None:
    with pytest.raises(ValueError, match=r"program step: \['cache', 'window'\] are not states of"):
        Manifest(**changed(MANIFEST, states=(CELL,)))
    with pytest.raises(ValueError, match=r"must have one alias or be read-only; the aliases have"):
        CompiledProgram(**changed(STEP, read_only=("cell",)))
    with pytest.raises(ValueError, match=r"must have one alias or be read-only; the aliases have"):
        CompiledProgram(**changed(STEP, read_only=("cache", "cell", "window")))


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ((Call(program="encode"),), r"schedule s calls \['encode'\]; the programs are \['step'\]"),
        (
            (Loop(calls=(Call(program="encode"),)),),
            r"schedule s calls \['encode'\]; the programs are \['step'\]",
        ),
        (
            (Call(program="step", until="token", at_most=3),),
            r"runs until 'token'; the outputs of program step with the role done are \[\]",
        ),
        (
            (Loop(calls=(Call(program="step"),), until="done", at_most=3),),
            r"runs until 'done'; the outputs of program step with the role done are \[\]",
        ),
    ],
)
def test_a_schedule_must_name_programs_and_outputs(calls: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Manifest(**changed(MANIFEST, schedules=(Schedule(name="s", calls=calls),)))


def test_a_schedule_of_calls_and_loops_survives_the_file(tmp_path: Path) -> None:
    step = Call(program="step", until="done", at_most=3)
    loop = Loop(calls=(step, Call(program="step")), until="done", at_most=9)
    schedule = Schedule(name="s", calls=(step, loop))
    program = CompiledProgram(**changed(STEP, outputs=(TOKEN, LOGITS, DONE)))
    Manifest(**changed(MANIFEST, programs=(program,), schedules=(schedule,))).save(tmp_path)
    assert Manifest.load(tmp_path).schedules == (schedule,)
    assert schedule.loops == (Loop(calls=(step,)), loop)


def test_a_schedule_must_end() -> None:
    with pytest.raises(ValueError, match="until 'done' needs an at_most, so that every request"):
        Schedule(name="s", calls=(Call(program="step", until="done"),))
    with pytest.raises(ValueError, match="until 'done' needs an at_most, so that every request"):
        Schedule(name="s", calls=(Loop(calls=(Call(program="step"),), until="done"),))


@pytest.mark.parametrize(
    ("role", "dtype", "shape", "message"),
    [
        ("tokens", Dtype.INT32, (1,), "of the role tokens must be int64 with one axis a row"),
        ("tokens", Dtype.INT64, (1, 2), "of the role tokens must be int64 with one axis a row"),
        ("tokens", Dtype.INT64, (-1,), "output said must have a fixed shape in each call"),
        ("done", Dtype.INT64, (1,), "of the role done must be bool with one axis a row"),
        ("done", Dtype.BOOL, (2,), "of the role done must have one entry a row"),
        ("accepted", Dtype.INT64, (2,), "of the role accepted must have one entry a row"),
    ],
)
def test_outputs_of_a_schedule_have_types_of_their_own(
    role: str, dtype: Dtype, shape: tuple[int, ...], message: str
) -> None:
    output = TensorSpec(name="said", role=Role(role), dtype=dtype, shape=shape)
    with pytest.raises(ValueError, match=message):
        CompiledProgram(**changed(STEP, outputs=(TOKEN, LOGITS, output)))


def row_program(name: str, **values: Any) -> CompiledProgram:
    """A rectangular program that writes the state `cell`."""
    fields = {
        "name": name,
        "row_layout": "rectangular",
        "inputs": (SCALE, SLOTS),
        "outputs": (renamed(DONE, name=f"done_{name}"),),
        "aliases": (Alias(output="cell_updated", input="cell", kind="operator"),),
        "chunk": 1,
        "states": ("cell",),
        "read_only": (),
    }
    return CompiledProgram(**changed(STEP, **fields | values))


def two_programs(*, calls: tuple[str, ...] = ("a", "b"), **values: Any) -> Manifest:
    programs = (row_program("a"), row_program("b", **values))
    schedule = Schedule(name="s", calls=tuple(Call(program=name) for name in calls))
    return Manifest(
        **changed(MANIFEST, capacity=None, states=(CELL,), programs=programs, schedules=(schedule,))
    )


def test_a_request_of_several_programs_has_their_inputs_and_outputs() -> None:
    tokens = TensorSpec(name="ids", role=Role.TOKENS, dtype=Dtype.INT64, shape=(2,))
    manifest = two_programs(outputs=(tokens,), max_rows=3)
    assert manifest.is_scheduled
    assert [spec.name for spec in manifest.interface.inputs] == ["scale"]
    assert [(spec.name, spec.shape) for spec in manifest.interface.outputs] == [
        ("done_a", (1,)),
        ("ids", (-1,)),
    ]
    assert manifest.interface.max_rows == 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"calls": ("a",)}, r"no schedule calls the programs \['b'\]"),
        (
            {"outputs": (renamed(DONE, name="done_a"),)},
            r"outputs \['done_a'\] are of more than one program",
        ),
        ({"inputs": (renamed(SCALE, shape=(4,)), SLOTS)}, "input scale differs between programs"),
        (
            {"aliases": (Alias(output="cell_updated", input="cell", kind="copy"),)},
            "which other programs would not see",
        ),
    ],
)
def test_programs_must_fit_together(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        two_programs(**values)


def test_a_state_of_several_programs_must_be_written_by_one() -> None:
    programs = tuple(
        row_program(name, aliases=(), read_only=("cell",), outputs=()) for name in ("a", "b")
    )
    schedule = Schedule(name="s", calls=(Call(program="a"), Call(program="b")))
    values = {"states": (CELL,), "programs": programs, "schedules": (schedule,)}
    with pytest.raises(ValueError, match=r"no program writes the states \['cell'\]"):
        Manifest(**changed(MANIFEST, capacity=None, **values))


def test_a_needed_file_must_be_listed() -> None:
    with pytest.raises(ValueError, match=r"the files \['engine.safetensors'\] are needed"):
        Manifest(**changed(MANIFEST, files=()))
    initial = StateSpec(**changed(CELL, initial="cell"))
    with pytest.raises(ValueError, match=r"the files \['initial.safetensors'\] are needed"):
        Manifest(**changed(MANIFEST, states=(CACHE, initial, WINDOW)))


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../x", "a/../../x", "a//x", "./x", "a/.", "", "a\0b", "a/"]
)
def test_a_file_name_stays_inside_the_folder(tmp_path: Path, name: str) -> None:
    fields = json.loads(MANIFEST.model_dump_json())
    fields["files"][0]["name"] = name
    save(tmp_path, fields)
    with pytest.raises(LoadError, match=r"is damaged \(files.0.name: .*not the name of a file"):
        Manifest.load(tmp_path)
    fields["files"][0]["name"] = "engine.safetensors"
    fields["programs"][0]["engine"]["file"] = name
    save(tmp_path, fields)
    with pytest.raises(LoadError, match=r"is damaged \(programs.0.engine.file: .*not the name"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize(
    ("direction", "role", "message"),
    [
        ("inputs", "value", "program step: input scale has the role value; an input has one of"),
        ("outputs", "row", "program step: output token has the role row; an output has one of"),
    ],
)
def test_inputs_and_outputs_have_roles_of_their_own(
    direction: str, role: str, message: str
) -> None:
    spec = renamed(SCALE if direction == "inputs" else TOKEN, role=Role(role))
    others = (TOKENS, SLOTS) if direction == "inputs" else (LOGITS,)
    with pytest.raises(ValueError, match=message):
        CompiledProgram(**changed(STEP, **{direction: (*others, spec)}))


def test_a_program_is_found_by_its_name() -> None:
    assert MANIFEST.program("step") is STEP
    with pytest.raises(LoadError, match=r"the engine has no program 'encode', only \['step'\]"):
        MANIFEST.program("encode")


def test_clients_fill_tokens_and_rows_and_nothing_else() -> None:
    assert STEP.client_inputs == (TOKENS, SCALE)


def test_slot_bytes_add_up() -> None:
    assert (CACHE.slot_bytes, CELL.slot_bytes, WINDOW.slot_bytes) == (2 * 16 * 4 * 2, 3 * 4, 5 * 4)
    assert MANIFEST.slot_bytes == 256 + 12 + 20


def test_records_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        CACHE.name = "other"
    assert CACHE.name == "cache"


def test_dtypes_are_torchs() -> None:
    for dtype in Dtype:
        assert Dtype.of(dtype.as_torch) is dtype
        assert str(dtype.as_torch) == f"torch.{dtype}"
    with pytest.raises(ValueError, match="float8_e8m0fnu"):
        Dtype.of(torch.float8_e8m0fnu)
