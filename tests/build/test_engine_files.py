"""The engine file is written piece by piece, can be read, and a full disk is an error."""

import os
import resource
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from inplace_builder.engine_files import ArchiveFile, save_archive

pytestmark = pytest.mark.slow

LAYERS, WIDTH = 16, 2048


def exported(layers: int, width: int) -> torch.export.ExportedProgram:
    """A stack of linear layers without a bias."""
    module = torch.nn.Sequential(
        *(torch.nn.Linear(width, width, bias=False) for _ in range(layers))
    )
    with torch.no_grad():
        return torch.export.export(module.eval(), (torch.zeros(1, width),))


def test_what_is_saved_loads_and_computes_the_same(tmp_path: Path) -> None:
    program = exported(2, 8)
    save_archive(program, tmp_path / "engine.pt2")
    value = torch.randn(1, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # read-only buffers become tensors
        loaded = torch.export.load(tmp_path / "engine.pt2")
    assert torch.equal(loaded.module()(value), program.module()(value))


def peak_growth(folder: Path) -> None:
    """Print by how many bytes saving raised this process' peak memory, and the file's size."""
    program = exported(LAYERS, WIDTH)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    save_archive(program, folder / "engine.pt2")
    print(
        (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024,
        (folder / "engine.pt2").stat().st_size,
    )


def test_no_copy_of_the_archive_is_held_in_memory(tmp_path: Path) -> None:
    """PyTorch itself makes one temporary copy of the weights; there must not be a second."""
    code = f"import test_engine_files as t; t.peak_growth(t.Path({str(tmp_path)!r}))"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    growth, size = map(int, run.stdout.split())
    assert size > LAYERS * WIDTH * WIDTH * 4
    assert growth < 1.5 * size


def test_a_file_that_cannot_be_opened_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ArchiveFile(tmp_path / "nowhere" / "engine.pt2")


def test_the_first_failed_write_is_raised_at_the_end_and_nothing_is_written_after_it() -> None:
    file = ArchiveFile(Path("/dev/full"))
    large = bytes(1 << 20)  # more than Python buffers: it fails in this call
    assert file.write(large) == len(large)
    assert file.write(b"more") == 4
    assert file.seek(0) == 0
    with pytest.raises(OSError, match="No space left on device"), file:
        pass
    assert file.closed


def test_an_error_of_the_last_buffered_bytes_is_raised_too() -> None:
    with (
        pytest.raises(OSError, match="No space left on device"),
        ArchiveFile(Path("/dev/full")) as file,
    ):
        file.write(b"few")
