"""Files of an engine folder: read once, checked, and never outside the folder."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from inplace.errors import LoadError
from inplace.schema.files import EngineFolder, FileRecord, record_files
from inplace.schema.specs import Dtype
from inplace.schema.tensor_file import as_dtype, read_tensors, write_tensors

CONTENT = bytes(range(256)) * 40


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the files ``engine`` and ``tokenizer/words``."""
    (tmp_path / "1" / "tokenizer").mkdir(parents=True)
    (tmp_path / "1" / "engine").write_bytes(CONTENT)
    (tmp_path / "1" / "tokenizer" / "words").write_bytes(b"words")
    return tmp_path / "1"


def record(name: str, content: bytes = CONTENT) -> FileRecord:
    return FileRecord(name=name, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def refusal(folder: Path, name: str = "engine", content: bytes = CONTENT) -> str:
    """The text of the LoadError, which names the file."""
    with pytest.raises(LoadError) as error:
        EngineFolder(folder).read(record(name, content))
    assert str(error.value).startswith(str(folder / name))
    return str(error.value)


def test_every_file_is_recorded_and_read_as_it_was(folder: Path) -> None:
    (folder / "engine.json").write_text("{}")
    records = record_files(folder, leave_out="engine.json")
    assert records == (record("engine"), record("tokenizer/words", b"words"))
    files = EngineFolder(folder)
    assert [bytes(files.read(each)) for each in records] == [CONTENT, b"words"]


def test_a_folder_may_be_reached_through_a_symbolic_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    assert EngineFolder(tmp_path / "link").read(record("engine")) == CONTENT


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "engine").unlink()
    assert "is missing; the manifest beside it names it: build the model again" in refusal(folder)


@pytest.mark.parametrize("content", [CONTENT[:-1], CONTENT + b"x", b"", CONTENT * 2])
def test_a_truncated_or_longer_file_is_named_with_both_sizes(folder: Path, content: bytes) -> None:
    (folder / "engine").write_bytes(content)
    assert (
        f"has {len(content):,} bytes, the manifest says {len(CONTENT):,}: it is truncated or "
        "replaced; build the model again" in refusal(folder)
    )


def test_a_changed_byte_is_named_with_both_checksums(folder: Path) -> None:
    changed = CONTENT[:100] + b"\xff" + CONTENT[101:]
    (folder / "engine").write_bytes(changed)
    actual, recorded = (hashlib.sha256(each).hexdigest()[:12] for each in (changed, CONTENT))
    assert (
        f"has the checksum {actual}…, the manifest says {recorded}…: it was changed; build the "
        "model again" in refusal(folder)
    )


def test_a_file_that_grows_while_it_is_read_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fstat

    def grows(descriptor: int) -> os.stat_result:
        before = real(descriptor)
        with (folder / "engine").open("ab") as file:
            file.write(b"more")
        return before

    monkeypatch.setattr(os, "fstat", grows)
    with pytest.raises(LoadError, match=r"has 10,24\d bytes, the manifest says 10,240"):
        EngineFolder(folder).read(record("engine"))


def link(path: Path, target: Path) -> None:
    path.unlink()
    path.symlink_to(target)


def test_links_devices_and_pipes_are_not_opened(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(CONTENT)
    text = "is not a regular file inside its folder"
    link(folder / "engine", outside)
    assert text in refusal(folder)
    link(folder / "engine", Path("tokenizer/words"))  # a link inside the folder is one too
    assert text in refusal(folder)
    (folder / "engine").unlink()
    os.mkfifo(folder / "engine")  # opening it must not wait for a writer
    assert text in refusal(folder)
    (folder / "engine").unlink()
    (folder / "engine").mkdir()
    assert text in refusal(folder)
    (folder / "tokenizer").rename(tmp_path / "elsewhere")
    (folder / "tokenizer").symlink_to(tmp_path / "elsewhere")
    assert text in refusal(folder, "tokenizer/words", b"words")


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../outside", "tokenizer/../../outside", "tokenizer//words", "."]
)
def test_a_name_outside_the_folder_is_refused_though_no_manifest_was_validated(
    folder: Path, name: str
) -> None:
    """A record that was made without validation, as code could do."""
    unchecked = FileRecord.model_construct(name=name, bytes=1, sha256="0" * 64)
    with pytest.raises(ValueError, match="is not the name of a file inside the engine's folder"):
        EngineFolder(folder).read(unchecked)


# --- code ---


def test_a_plan_is_read_only_below_a_trusted_folder(folder: Path, tmp_path: Path) -> None:
    assert EngineFolder(folder).read_code(record("engine")) == CONTENT
    assert EngineFolder(folder, [tmp_path]).read_code(record("engine")) == CONTENT
    other = tmp_path / "other"
    other.mkdir()
    for trusted in ([other], [], [tmp_path / "1" / "engine-not"], [f"{folder}x"]):
        with pytest.raises(LoadError) as error:
            EngineFolder(folder, trusted).read_code(record("engine"))
        assert str(error.value).startswith(
            f"{folder / 'engine'} is a TensorRT plan, which is code, and is outside the folders "
            "whose code may run ("
        )
        assert "`inplace serve --trust-models`, INPLACE_TRUST_MODELS" in str(error.value)


def test_a_link_out_of_a_trusted_folder_is_not_trusted(folder: Path, tmp_path: Path) -> None:
    trusted = tmp_path / "repository"
    trusted.mkdir()
    (trusted / "1").symlink_to(folder)
    with pytest.raises(LoadError, match="is outside the folders whose code may run"):
        EngineFolder(trusted / "1", [trusted]).check_trusted(record("engine"))


# --- tensors ---


@pytest.mark.parametrize("dtype", list(Dtype))
def test_tensors_of_every_type_survive_the_file_bit_for_bit(tmp_path: Path, dtype: Dtype) -> None:
    size = 6 * dtype.as_torch.itemsize
    bits = torch.arange(size, dtype=torch.uint8)
    tensor = (bits % 2 if dtype is Dtype.BOOL else bits).view(dtype.as_torch).reshape(2, 3)
    empty = torch.empty(0, 3, dtype=dtype.as_torch)
    number = torch.zeros((), dtype=dtype.as_torch)
    one = tensor.reshape(-1)[1::3][:1]  # contiguous, with a stride of 3
    tensors = {"transposed": tensor.t(), "empty": empty, "number": number, "one": one}
    write_tensors(tmp_path / "file", tensors)
    content = torch.frombuffer(bytearray((tmp_path / "file").read_bytes()), dtype=torch.uint8)
    read = read_tensors(content.numpy().data, "file")
    for name, expected in tensors.items():
        result = as_dtype(read[name], dtype)
        assert (result.dtype, result.shape) == (expected.dtype, expected.shape)
        contiguous = expected.clone(memory_format=torch.contiguous_format)
        contiguous = contiguous.reshape(-1).view(torch.uint8)
        assert torch.equal(result.reshape(-1).view(torch.uint8), contiguous)


def test_a_complex_tensor_behind_an_odd_number_of_floats_is_read(tmp_path: Path) -> None:
    path = tmp_path / "tensors.safetensors"
    pairs = torch.randn(3, dtype=torch.complex64)
    write_tensors(path, {"a": torch.ones(1), "b": pairs})
    read = read_tensors(memoryview(path.read_bytes()), str(path))
    assert torch.equal(as_dtype(read["b"], Dtype.COMPLEX64), pairs)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        b"\xff" * 40,
        b"\x02\0\0\0\0\0\0\0[]",
        b'\x0a\0\0\0\0\0\0\0{"a": null',
    ],
)
def test_a_file_without_tensors_is_a_load_error(content: bytes) -> None:
    with pytest.raises(LoadError, match="file cannot be read as a safetensors file"):
        read_tensors(memoryview(bytearray(content)), "file")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 9]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 800]},
        {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]},
        {"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]},
        {"dtype": "F31", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32"},
    ],
)
def test_a_tensor_outside_its_file_is_a_load_error(entry: dict[str, object]) -> None:
    header = json.dumps({"a": entry}).encode()
    content = bytearray(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(LoadError, match="file cannot be read as a safetensors file"):
        read_tensors(memoryview(content), "file")
