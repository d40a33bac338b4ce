"""An engine directory that cannot be served is refused at load; the error names what is wrong."""

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from inplace.engines.arena import Arena, available_memory
from inplace.errors import LoadError
from inplace.runtime.instance import ModelInstance
from inplace.runtime.loading import load_engine, make_arena
from inplace.schema.files import EngineFolder
from inplace.schema.served import Manifest
from inplace.schema.specs import Dtype, StateSpec, Update
from support.engine_graph import graph_json, replace_graph
from support.manifests import edit, exchange
from support.models import SLOTS, Repository, open_instance

ENGINE = "engine.safetensors"


@pytest.fixture
def model(repository: Repository, tmp_path: Path) -> Path:
    """A copy of the tiny Llama's model folder, to damage."""
    return shutil.copytree(repository.path / "llama", tmp_path / "llama")


def refusal(model: Path) -> str:
    """The text of the LoadError."""
    folder = EngineFolder(model / "1")
    manifest = Manifest.load(folder.path)
    with pytest.raises(LoadError) as error:
        load_engine(folder, manifest, make_arena(folder, manifest, 2))
    assert str(error.value).startswith(str(model / "1" / ENGINE))
    return str(error.value)


def test_an_untouched_engine_loads(model: Path) -> None:
    assert open_instance(model).arena.slots == SLOTS


def test_loading_imports_no_compiler(repository: Repository) -> None:
    """sympy, Dynamo and Triton's compiler take seconds of every model instance's start."""
    code = (
        "import sys; from inplace.drivers import step_driver, stream_driver; "
        "from inplace.runtime.instance import ModelInstance; "
        f"ModelInstance.open({str(repository.path / 'llama' / '1')!r}); "
        "print(*{'sympy', 'torch._dynamo', 'triton', 'networkx'} & set(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ran.stdout, ran.stderr) == ("\n", "")


def test_a_missing_engine_file_is_named(model: Path) -> None:
    (model / "1" / ENGINE).unlink()
    assert "is missing; the manifest beside it names it: build the model again" in refusal(model)
    (model / "1" / ENGINE).mkdir()
    assert "is not a regular file inside its folder" in refusal(model)


@pytest.mark.parametrize("keep", [0, 1000, -1])
def test_a_truncated_engine_file_is_named_with_both_sizes(model: Path, keep: int) -> None:
    path = model / "1" / ENGINE
    whole = path.read_bytes()
    path.write_bytes(whole[:keep])
    assert (
        f"has {len(whole[:keep]):,} bytes, the manifest says {len(whole):,}: it is truncated or"
        f" replaced" in refusal(model)
    )


@pytest.mark.parametrize("where", [0.0, 0.5, 0.999])
def test_one_changed_byte_is_found_by_the_checksum(model: Path, where: float) -> None:
    path = model / "1" / ENGINE
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 1
    path.write_bytes(content)
    actual = hashlib.sha256(content).hexdigest()
    recorded = Manifest.load(model / "1").file(ENGINE).sha256
    message = refusal(model)
    assert f"has the checksum {actual[:12]}…, the manifest says {recorded[:12]}…" in message
    assert message.endswith("changed; build the model again")


def test_a_file_that_is_no_program_is_refused_though_its_checksum_is_right(model: Path) -> None:
    exchange(model / "1", ENGINE, b"no archive at all")
    assert "cannot be read as a safetensors file" in refusal(model)


@pytest.mark.parametrize("index", range(4))
def test_an_alias_the_manifest_does_not_declare_is_named(model: Path, index: int) -> None:
    names = [state.name for state in Manifest.load(model / "1").states]

    def only_reads(fields: dict[str, Any]) -> None:
        alias = fields["programs"][0]["aliases"].pop(index)
        fields["programs"][0]["read_only"] = [alias["input"]]

    edit(model / "1", only_reads)
    message = (
        f"the states the graph writes in place and the aliases the manifest declares differ in"
        f" {[names[index]]}; build the model again"
    )
    assert message in refusal(model)


def test_an_alias_of_a_state_the_graph_does_not_write_is_named(
    repository: Repository, tmp_path: Path
) -> None:
    """Two engines of one signature; only one of them writes `count`."""
    model = shutil.copytree(repository.path / "accumulator", tmp_path / "accumulator")
    path = model / "1" / ENGINE
    record = graph_json(path)
    nodes = record["graph"]["nodes"]
    [idle] = [
        node
        for node in nodes
        if node["target"] == "inplace::update.default" and node["args"][0] == {"node": "count"}
    ]
    nodes.remove(idle)
    replace_graph(path, record)
    exchange(model / "1", ENGINE, path.read_bytes())
    assert "the aliases the manifest declares differ in ['count']" in refusal(model)


def rename_input(fields: dict[str, Any]) -> None:
    fields["programs"][0]["inputs"][0]["name"] = "tokens"


def swap_inputs(fields: dict[str, Any]) -> None:
    inputs = fields["programs"][0]["inputs"]
    inputs[1], inputs[2] = inputs[2], inputs[1]


def drop_input(fields: dict[str, Any]) -> None:
    inputs = fields["programs"][0]["inputs"]
    inputs.remove(next(spec for spec in inputs if spec["name"] == "last_tokens"))


def add_input(fields: dict[str, Any]) -> None:
    fields["programs"][0]["inputs"].append({"name": "more", "role": "row", "dtype": "float32"})


def swap_states(fields: dict[str, Any]) -> None:
    fields["programs"][0]["states"].reverse()


def add_state(fields: dict[str, Any]) -> None:
    fields["states"].append({"name": "more", "shape": [1], "dtype": "float32", "update": "replace"})
    fields["programs"][0]["states"].append("more")
    fields["programs"][0]["read_only"] = ["more"]


@pytest.mark.parametrize(
    "change", [rename_input, swap_inputs, drop_input, add_input, swap_states, add_state]
)
def test_inputs_other_than_the_graphs_are_listed(
    model: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    def names() -> list[str]:
        program = Manifest.load(model / "1").program("step")
        return [spec.name for spec in program.inputs] + list(program.states)

    before = names()
    edit(model / "1", change)
    assert names() != before
    assert f"takes {before}, the manifest says {names()}; build the model again" in refusal(model)


def test_outputs_other_than_the_graphs_are_refused(model: Path) -> None:
    edit(
        model / "1",
        lambda fields: fields["programs"][0]["outputs"].append(
            {"name": "more", "role": "value", "dtype": "float32"}
        ),
    )
    assert "returns" in refusal(model)


def test_a_program_that_samples_what_it_does_not_return_is_damaged(model: Path) -> None:
    edit(model / "1", lambda fields: fields["programs"][0]["outputs"].pop(0))
    with pytest.raises(LoadError, match="is damaged"):
        Manifest.load(model / "1")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_an_engine_for_a_gpu_is_refused_where_there_is_none(model: Path) -> None:
    edit(model / "1", lambda fields: fields["programs"][0]["engine"].update(device="cuda"))
    assert (
        "was built for a GPU and PyTorch finds none on this machine; build with --device cpu"
        in refusal(model)
    )


def test_an_engine_without_a_step_has_a_schedule_which_packed_programs_lack(model: Path) -> None:
    def rename(fields: dict[str, Any]) -> None:
        fields["programs"][0].update(name="encode")
        fields["schedules"] = [{"name": "default", "calls": [{"program": "encode"}]}]

    edit(model / "1", rename)
    with pytest.raises(LoadError, match="input input_ids of the role tokens in a schedule"):
        ModelInstance.open(model / "1")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda fields: fields.update(
                schedules=[{"name": "twice", "calls": [{"program": "step", "at_most": 2}]}]
            ),
            "input input_ids of the role tokens in a schedule",
        ),
        (
            lambda fields: fields["states"][0].update(scale="scales"),
            "scale of state ",
        ),
    ],
)
def test_what_a_later_runtime_runs_is_refused_by_name(
    model: Path, change: Callable[[dict[str, Any]], None], text: str
) -> None:
    edit(model / "1", change)
    with pytest.raises(LoadError) as error:
        ModelInstance.open(model / "1")
    assert str(error.value).startswith(
        f"{model / '1' / 'engine.json'} needs a later version of inplace: {text}"
    )
    assert str(error.value).endswith(
        "update inplace on this server, or build the model with this version"
    )


def as_plan(fields: dict[str, Any]) -> None:
    """Let the manifest call the engine file a TensorRT plan."""
    plan = {
        "flavor": "tensorrt",
        "version": "10",
        "gpu": "some GPU",
        "compute_capability": "9.0",
        "profiles": [{"rows": [1, 8], "tokens": [1, 64]}],
    }
    fields["programs"][0]["engine"].update(kind="tensorrt", device="cuda", plan=plan)


def test_a_plan_outside_the_trusted_folders_is_refused_before_anything_of_it_is_read(
    model: Path, tmp_path: Path
) -> None:
    edit(model / "1", as_plan)
    (model / "1" / ENGINE).write_bytes(b"not even read")
    (tmp_path / "other").mkdir()
    with pytest.raises(LoadError, match="is a TensorRT plan, which is code, and is outside"):
        ModelInstance.open(model / "1", trust=[tmp_path / "other"])
    if not torch.cuda.is_available():
        for trust in (None, [tmp_path]):
            with pytest.raises(LoadError, match=r"built for a GPU \(some GPU\) and PyTorch finds"):
                ModelInstance.open(model / "1", trust=trust)


# --- the arena ---

CACHE = StateSpec(
    name="cache",
    shape=(2, 8),
    dtype=Dtype.FLOAT32,
    update=Update.APPEND,
    axis=1,
    fill=-1.0,
    reset=False,
)
CELL = StateSpec(name="cell", shape=(3,), dtype=Dtype.INT32, update=Update.REPLACE, fill=7)


def test_an_arena_too_large_for_memory_is_a_load_error_with_its_bytes() -> None:
    slots = 1 << 50
    with pytest.raises(LoadError) as error:
        Arena((CELL, CACHE), slots, torch.device("cpu"))
    assert (
        f"the arena of {slots} slots needs {slots * (12 + 64):,} bytes of cpu memory, which could"
        f" not be allocated (" in str(error.value)
    )
    assert str(error.value).endswith("): build with fewer slots or a smaller capacity")
    assert "\n" not in str(error.value)


def test_memory_is_what_the_machine_and_every_control_group_around_the_process_leave(
    tmp_path: Path,
) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    inner = groups / "pod" / "server"
    for folder in (proc / "self", inner):
        folder.mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 64 kB\nMemAvailable:    50 kB\n")
    assert available_memory(proc, groups) == 50 * 1024
    (proc / "self" / "cgroup").write_text("0::/pod/server\n")
    assert available_memory(proc, groups) == 50 * 1024  # no limit is known
    for folder, most in ((inner, "max"), (inner.parent, "40000")):
        for name, text in (
            ("memory.max", most),
            ("memory.current", "30000"),
            ("memory.stat", "anon 10\ninactive_file 6000"),
        ):
            (folder / name).write_text(text + "\n")
    assert available_memory(proc, groups) == 40000 - 30000 + 6000
    (proc / "self" / "cgroup").write_text(
        "0::/\n"
    )  # as a container sees itself: its own group is the root
    for name in ("memory.max", "memory.current", "memory.stat"):
        (inner.parent / name).rename(groups / name)
    assert available_memory(proc, groups) == 16000


def test_an_arena_holds_its_fill_and_resets_only_what_asks_for_it_in_place() -> None:
    arena = Arena((CELL, CACHE), 3, torch.device("cpu"))
    assert arena.bytes == 3 * (12 + 64)
    cell, cache = arena.tensors["cell"], arena.tensors["cache"]
    assert torch.equal(cell, torch.full((3, 3), 7, dtype=torch.int32))
    assert torch.equal(cache, torch.full((3, 2, 8), -1.0))
    addresses = arena.addresses()
    assert addresses == {"cell": cell.data_ptr(), "cache": cache.data_ptr()}
    cell.fill_(1)
    cache.fill_(1.0)
    arena.reset(1)
    assert cell.tolist() == [[1] * 3, [7] * 3, [1] * 3]
    assert torch.equal(cache, torch.ones(3, 2, 8))
    assert arena.addresses() == addresses
