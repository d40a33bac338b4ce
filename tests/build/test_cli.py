"""The console command."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from google.protobuf import text_format
from inplace import __version__
from inplace.schema.served import Manifest
from inplace_builder.__main__ import app
from support.long import long_except
from support.models import Repository
from tritonclient.grpc import model_config_pb2 as pb
from typer.testing import CliRunner

pytestmark = pytest.mark.slow

KEYS = [f"{part}_states_{layer}" for part in ("key", "value") for layer in range(2)]
SLOT_BYTES = 2 * 2 * (2 * 32 * 16) * 4  # keys and values, layers, heads × capacity × dim, float32


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short relative paths: what is printed is not wrapped in the middle of one."""
    monkeypatch.chdir(tmp_path)


def inplace(*arguments: str) -> tuple[int, str, str]:
    """Exit status, standard output, standard error."""
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.stdout, result.stderr


def build(llama_folder: Path, *arguments: str) -> str:
    """A successful build's output."""
    status, out, err = inplace(
        "build", str(llama_folder), "--capacity", "32", "--chunk", "8", "--slots", "4", *arguments
    )
    assert (status, err) == (0, "")
    return out


def words(text: str) -> str:
    """A table without its drawing, one space between words."""
    return re.sub(r"[\s│┃]+", " ", text)


def test_build_prints_its_stages_in_order_and_what_it_made(llama_folder: Path) -> None:
    out = build(llama_folder, "--output", "repository/tiny")
    stages = [
        "load the model",
        "capture the graph",
        "write the engine",
        "verify it against the model",
        "done",
    ]
    assert [line for line in stages if f"✓ {line}" in out] == stages
    assert sorted(stages, key=out.index) == stages
    shown = words(out)
    assert "model tiny (torch, float32, cpu)" in shown
    assert "key_states_0 … value_states_1 (4): [2, 32, 16] float32, append along axis 1" in shown
    assert f"({SLOT_BYTES:,} bytes), capacity 32" in shown
    assert f"arena 4 slots, {4 * SLOT_BYTES / 1000:.1f} kB" in shown
    assert "verified executed, largest relative error" in shown
    assert "tokenizer none, clients send token ids, not text" in shown
    assert "written to repository/tiny" in shown
    assert Manifest.load(Path("repository/tiny/1")).name == "tiny"


@pytest.mark.parametrize("name", ["a/b", "..", "", "/tiny"])
def test_a_name_that_is_no_folder_is_refused_before_the_model_is_read(name: str) -> None:
    status, _, err = inplace("build", "nowhere", "--output", "repository", "--name", name)
    assert status == 1
    assert f"the name is {name!r}; it must be a folder name without a slash" in words(err)


def test_name_puts_the_model_into_the_repository_under_that_name(llama_folder: Path) -> None:
    assert "written to repository/other" in words(
        build(llama_folder, "--output", "repository", "--name", "other")
    )
    assert Manifest.load(Path("repository/other/1")).name == "other"
    build(llama_folder, "--output", "repository/other", "--name", "other")
    assert [path.name for path in Path("repository").iterdir()] == ["other"]


def test_the_options_reach_the_engine(llama_folder: Path) -> None:
    rows, times = (
        ("--max-batch", "3", "--dtype", "bfloat16", "--min-capacity", "16"),
        ("--idle-timeout", "7.5", "--queue-delay-us", "123"),
    )
    store = ("--snapshot-store", "file:///s", "--snapshot-secret-file", "/key")
    others = ("--instances", "2", "--share-engine", *store, "--snapshot-every", "64")
    build(llama_folder, "--output", "m", *rows, *times, *others)
    manifest = Manifest.load(Path("m/1"))
    assert manifest.min_capacity == 16
    program = manifest.program("step")
    assert (
        manifest.slots,
        manifest.capacity,
        program.max_rows,
        program.chunk,
        program.engine.dtype,
    ) == (4, 32, 3, 8, "bfloat16")
    config = Path("m/config.pbtxt").read_text()
    parsed = text_format.Parse(config, pb.ModelConfig()).parameters
    assert {name: parsed[name].string_value for name in parsed if "snapshot" in name} == {
        "snapshot_store": "file:///s", "snapshot_secret_file": "/key", "snapshot_every": "64",
    }  # fmt: skip
    assert "max_sequence_idle_microseconds: 7500000" in config
    assert "max_queue_delay_microseconds: 123" in config
    assert "count: 2" in config
    assert 'key: "share_engine"' in config


@pytest.mark.parametrize("given", ["llama", "llama/1"])
def test_inspect_prints_everything_of_an_engine(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.chdir(repository.path)
    status, out, err = inplace("inspect", given)
    assert (status, err) == (0, "")
    shown = words(out)
    assert "program step: packed, at most 8 rows, 8 tokens a row" in shown
    assert re.search(r"input_ids in tokens int64 \[-1\] 0 … 511 ", shown)
    assert re.search(r"logits out logits float32 \[512\] on request ", shown)
    for name in KEYS:
        assert f"{name}_updated@{name}@operator" in shown
    assert {"PyTorch", "operators", "themselves,", "bound", "tensor"} <= set(
        shown.split()
    )  # the reason, wrapped in its column
    for key, value in {
        "inplace": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }.items():
        assert f" {key} {value} " in shown
    assert " architecture LlamaForCausalLM " in shown


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["build", "nowhere", "--output", "m"], "error: nowhere is not a folder here"),
        (
            ["build", ".", "--output", "m"],
            "error: . is not a model: it holds neither config.json nor a GGUF file",
        ),
        (
            ["build", ".", "--output", "m", "--slots", "0"],
            "error: slots is 0; it must be at least 1",
        ),
        (
            ["build", ".", "--output", "m", "--slots", "2", "--max-batch", "3"],
            "error: a batch of 3 rows needs as many slots",
        ),
        (
            ["build", ".", "--output", "m", "--dtype", "float16"],
            "error: dtype float16 is not supported on device 'cpu'; choose one of ['float32', 'bf",
        ),
        (
            ["build", ".", "--output", "m", "--snapshot-every", "3"],
            "error: there are options of a store of snapshots, and no store: name one",
        ),
        (
            ["build", ".", "--output", "m", "--snapshot-store", "/folder"],
            "error: the store of the snapshots is '/folder'; expected the URL of a folder",
        ),
        (
            ["build", ".", "--output", "m", "--snapshot-store", "file:///s"],
            "error: the snapshots have no secret_file; name a file with 32 random bytes",
        ),
        (
            ["serve", "--snapshot-store", "file:///s", "--snapshot-secret-file", "key"],
            "error: --snapshot-store, --snapshot-secret-file: for MODEL, and none was given",
        ),
        (["inspect", "nowhere"], "error: nowhere/1/engine.json does not exist"),
        (
            ["chat", "nowhere", "--url", "127.0.0.1:1"],
            "error: 127.0.0.1:1 does not serve nowhere: ",
        ),
        pytest.param(["build", "[/nowhere]", "--output", "m"], "error: [/nowhere] does not exist"),
        pytest.param(["build", "[draft]", "--output", "m"], "error: [draft] does not exist"),
    ],
    ids=lambda value: "_".join(value[:2]) if isinstance(value, list) else "",
)
def test_an_error_is_one_line_on_stderr_and_exit_status_1(arguments: list[str], text: str) -> None:
    status, out, err = inplace(*arguments)
    assert status == 1
    assert err.startswith(text)
    assert err.count("\n") == 1
    assert "error" not in out
    assert list(Path().iterdir()) == []


def test_an_unknown_dtype_is_refused_with_the_choices() -> None:
    status, _, err = inplace("build", ".", "--output", "m", "--dtype", "float8")
    assert status == 2
    assert "bfloat16" in err


def test_an_unknown_cache_is_refused() -> None:
    status, _, err = inplace("build", ".", "--output", "m", "--cache", "int8")
    assert status == 2
    assert "'fp8'" in err


def test_options_of_serve_that_would_be_ignored_are_refused() -> None:
    status, _, err = inplace("serve", "--cache", "fp8", "--slots", "8")
    assert status == 1
    assert "--cache, --slots: for MODEL, and none was given" in err
    status, _, err = inplace("serve", "model", "--model-repository", "models")
    assert status == 1
    assert "--model-repository: MODEL is built into a repository of its own" in err
    for model, keys in (((), "--keys"), (("model", "--no-openai"), "--openai-port")):
        status, _, err = inplace("serve", *model, keys, "1")
        assert status == 1
        assert f"{keys}: for the OpenAI front end, which starts with --openai" in err


COMMAND = Path(sys.executable).with_name("inplace")


def test_the_installed_command_lists_every_command() -> None:
    run = subprocess.run([COMMAND, "--help"], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    listed = set(re.findall(r"^│ ([a-z-]+)  ", run.stdout, re.MULTILINE))
    assert {"build", "inspect", "serve", "install-backend", "chat"} <= listed


def test_the_version_is_the_packages() -> None:
    assert inplace("--version") == (0, f"inplace {__version__}\n", "")


def without(packages: list[str], *arguments: str) -> tuple[int, str]:
    """Exit status and standard error of the command where packages are not installed."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({packages})); "
        "from inplace_builder.__main__ import main"
    )
    run = subprocess.run(
        [sys.executable, "-c", f"{code}; main()", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    return run.returncode, run.stderr


@pytest.mark.parametrize(
    ("package", "arguments", "extra"),
    long_except(
        [
            ("torch", ("build", ".", "--output", "m"), "builder"),
            ("tritonclient", ("serve",), "server"),
        ],
        [
            ("torch", ("build", ".", "--output", "m"), "builder"),
            ("transformers", ("build", ".", "--output", "m"), "builder"),
            ("torch", ("inspect", "m"), "runtime"),
            ("tritonclient", ("serve",), "server"),
            ("tritonclient", ("install-backend", "m"), "server"),
            ("tokenizers", ("chat", "m"), "builder"),
        ],
    ),
)
def test_a_command_whose_packages_are_missing_names_the_extra_that_brings_them(
    package: str, arguments: tuple[str, ...], extra: str
) -> None:
    assert without([package], *arguments) == (
        1,
        f"error: `inplace {arguments[0]}` needs the package {package}, which is not installed: "
        f"install inplace-triton[{extra}]\n",
    )


def test_help_needs_no_package_of_any_extra() -> None:
    assert without(["torch", "transformers", "tritonclient", "pydantic"], "--help") == (0, "")
