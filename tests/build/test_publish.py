"""The output folder is replaced whole or left alone, and nothing is left beside it."""

import hashlib
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import transformers
from inplace.schema.served import FILE_NAME, Manifest
from inplace_builder.engine_files import TORCH_FILE
from inplace_builder.errors import BuildError
from inplace_builder.served.build import write_engine
from inplace_builder.served.model_config import MODEL_VERSION
from inplace_builder.served.options import BuildOptions
from support.long import long_except
from support.models import accumulator, tiny_llama
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

OPTIONS = BuildOptions(slots=4, max_rows=4, capacity=1)


def contents(folder: Path) -> dict[str, str]:
    """Every file in a folder, hidden ones included, by its checksum."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


@pytest.fixture
def older(tmp_path: Path) -> Path:
    """An engine directory alone in its repository."""
    folder = tmp_path / "repository" / "model"
    write_engine(accumulator(), folder, OPTIONS)
    return folder


def fails_in_verification(output: Path) -> None:
    capture = accumulator()
    wrong = replace(
        capture,
        reference=lambda requests: {
            name: value + 1 for name, value in capture.reference(requests).items()
        },
    )
    with pytest.raises(BuildError, match="differs from the model"):
        write_engine(wrong, output, OPTIONS)


def fails_while_writing(output: Path) -> None:
    def extras(_: Path) -> None:
        raise OSError(28, os.strerror(28))

    with pytest.raises(BuildError, match=r"model cannot be written: .*No space left on device"):
        write_engine(accumulator(), output, OPTIONS, extras=extras)


def is_interrupted(output: Path) -> None:
    def stage(what: str) -> None:
        if what.startswith("verify"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_engine(accumulator(), output, OPTIONS, stage)


FAILURES = [fails_in_verification, fails_while_writing, is_interrupted]


@pytest.mark.parametrize("fail", FAILURES)
def test_a_failed_build_leaves_the_older_engine_byte_identical(
    older: Path, fail: Callable[[Path], None]
) -> None:
    before = contents(older.parent)
    fail(older)
    assert contents(older.parent) == before
    assert list(older.parent.iterdir()) == [older]


@pytest.mark.parametrize("fail", FAILURES)
def test_a_failed_build_leaves_no_folder_where_there_was_none(
    tmp_path: Path, fail: Callable[[Path], None]
) -> None:
    fail(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_successful_build_replaces_the_older_engine_whole(older: Path) -> None:
    (older / MODEL_VERSION / "stale.txt").write_text("of the older build")
    assert Manifest.load(older / MODEL_VERSION).slots == 4
    write_engine(accumulator(), older, BuildOptions(slots=6, max_rows=4, capacity=1))
    assert Manifest.load(older / MODEL_VERSION).slots == 6
    assert set(contents(older)) == {
        "config.pbtxt",
        f"{MODEL_VERSION}/{FILE_NAME}",
        f"{MODEL_VERSION}/{TORCH_FILE}",
    }
    assert list(older.parent.iterdir()) == [older]


def break_renames(monkeypatch: pytest.MonkeyPatch, error: BaseException, failing: set[int]) -> None:
    """From now on the renames with these numbers, counted from 1, raise the error."""
    rename, calls = Path.rename, itertools.count(1)

    def sometimes(path: Path, target: Path) -> Path:
        if next(calls) in failing:
            raise error
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", sometimes)


@pytest.mark.parametrize(
    ("error", "raised"),
    [(OSError(13, os.strerror(13)), BuildError), (KeyboardInterrupt(), KeyboardInterrupt)],
    ids=["disk", "interrupt"],
)
def test_an_older_engine_is_put_back_when_the_new_one_cannot_take_its_place(
    older: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, raised: type[BaseException]
) -> None:
    before = contents(older.parent)
    break_renames(monkeypatch, error, {2})
    with pytest.raises(raised):
        write_engine(accumulator(), older, BuildOptions(slots=6, max_rows=4, capacity=1))
    assert contents(older.parent) == before
    assert list(older.parent.iterdir()) == [older]


def test_an_older_engine_that_cannot_be_put_back_is_kept_and_named(
    older: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(older)
    break_renames(monkeypatch, OSError(13, os.strerror(13)), {2, 3})
    with pytest.raises(
        BuildError, match=r"could not be replaced .* nor restored .* there$"
    ) as failed:
        write_engine(accumulator(), older, OPTIONS)
    [kept] = older.parent.iterdir()
    assert f"move {kept} there" in str(failed.value)
    assert contents(kept) == before


def test_the_written_folder_can_be_read_by_a_server_of_another_user(older: Path) -> None:
    assert older.stat().st_mode & 0o777 == 0o755
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in older.rglob("*"))


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    write_engine(accumulator(), tmp_path / "model", OPTIONS)
    assert Manifest.load(tmp_path / "model" / MODEL_VERSION).name == "model"


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    thesis = tmp_path / "model" / "thesis.tex"
    thesis.parent.mkdir()
    thesis.write_text("years of work")
    with pytest.raises(BuildError, match="model is a folder with other files in it"):
        write_engine(accumulator(), tmp_path / "model", OPTIONS)
    assert contents(tmp_path) == {"model/thesis.tex": hashlib.sha256(b"years of work").hexdigest()}


def test_a_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("years of work")
    with pytest.raises(BuildError, match="model is a file; choose the folder"):
        write_engine(accumulator(), tmp_path / "model", OPTIONS)
    assert contents(tmp_path) == {"model": hashlib.sha256(b"years of work").hexdigest()}


def test_an_output_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BuildError, match="cannot be written"):
        write_engine(accumulator(), tmp_path / "file" / "model", OPTIONS)


def test_the_draft_of_a_killed_build_does_not_block_the_next(older: Path) -> None:
    left = older.with_name(".model.old") / MODEL_VERSION
    left.mkdir(parents=True)
    (left / FILE_NAME).write_text("{}")
    write_engine(accumulator(), older, OPTIONS)


@pytest.mark.slow
@pytest.mark.parametrize("limit", long_except([20_000], [20_000, 400_000, 2_000_000]))
def test_a_full_disk_ends_the_command_with_one_line_and_leaves_nothing(
    tmp_path: Path, limit: int
) -> None:
    """A limit on the size of files simulates the disk: the write fails in the same place."""
    tiny_llama(tmp_path / "llama")
    words = {f"word{index}": index for index in range(100_000)}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="word0"))
    )
    tokenizer.save_pretrained(tmp_path / "llama")
    output = tmp_path / "repository" / "model"
    output.parent.mkdir()
    limited = (
        f"import resource, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); "
        "runpy.run_module('inplace_builder', run_name='__main__')"
    )
    arguments = [
        "build",
        str(tmp_path / "llama"),
        "--output",
        str(output),
        "--capacity",
        "32",
        "--chunk",
        "8",
    ]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", limited, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1, run.stderr
    [line] = run.stderr.splitlines()
    assert line.startswith(f"error: {output} cannot be written: ")
    assert ("tokenizer: " in line) == (limit == 2_000_000)
    assert line.endswith("(nothing was left behind)")
    assert "Traceback" not in run.stdout
    assert list(output.parent.iterdir()) == []


def test_the_reference_may_be_moved_once_the_weights_are_written(tmp_path: Path) -> None:
    stages: list[str] = []

    def prepare() -> None:
        stages.append(
            "files" if list(tmp_path.glob(".model.*/1/engine.safetensors")) else "no files"
        )

    write_engine(accumulator(), tmp_path / "model", OPTIONS, stages.append, prepare=prepare)
    assert stages == ["write the engine", "verify it against the model", "files"]
