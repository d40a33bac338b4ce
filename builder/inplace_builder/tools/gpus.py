"""A model repository whose models run on some GPUs of the machine: `inplace serve --gpus`."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from google.protobuf import text_format
from inplace.errors import InplaceError
from tritonclient.grpc import model_config_pb2 as pb

CONFIG = "config.pbtxt"


def checked_gpus(gpus: tuple[int, ...]) -> tuple[int, ...]:
    """The GPUs that are named; all that PyTorch sees if none is.

    Raises:
        InplaceError: this machine does not have them, or one is named twice.
    """
    count = torch.cuda.device_count()
    has = f"{count} GPUs, from 0 to {count - 1}" if count else "no GPU"
    if not count or max(gpus, default=0) >= count:
        raise InplaceError(
            f"gpus is {list(gpus) or 'all'}; PyTorch sees {has} here: name others, or leave it out"
        )
    if len(set(gpus)) < len(gpus):
        raise InplaceError(
            f"gpus is {list(gpus)}; name each once (several engines on one GPU: instances)"
        )
    return gpus or tuple(range(count))


@contextlib.contextmanager
def on_gpus(repository: Path, gpus: tuple[int, ...]) -> Iterator[Path]:
    """A model repository with the same models, those for a GPU on these: an engine on each.

    It has configurations of its own, and links to everything else.

    Args:
        repository: the model repository, which is not changed.
        gpus: numbers as the server sees them.

    Raises:
        InplaceError: the repository has no model for a GPU, or a configuration cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="inplace-repository-") as scratch:
        changed = 0
        for model in sorted(each for each in repository.iterdir() if each.is_dir()):
            folder = Path(scratch) / model.name
            text = _with_gpus(model / CONFIG, gpus)
            if text is None:
                folder.symlink_to(model.resolve())
                continue
            changed += 1
            folder.mkdir()
            for each in model.iterdir():
                if each.name != CONFIG:
                    (folder / each.name).symlink_to(each.resolve())
            (folder / CONFIG).write_text(text)
        if not changed:
            raise InplaceError(
                f"no model of {repository} runs on a GPU, so gpus {list(gpus)} names none for it: "
                "leave it out, or build for device cuda"
            )
        yield Path(scratch)


def _with_gpus(file: Path, gpus: tuple[int, ...]) -> str | None:
    """A configuration with these GPUs; None if there is none, or its model runs on none."""
    if not file.is_file():
        return None
    try:
        config = text_format.Parse(file.read_text(), pb.ModelConfig())
    except (text_format.ParseError, UnicodeDecodeError) as error:
        raise InplaceError(f"{file} cannot be read: {error}") from error
    groups = [
        group for group in config.instance_group if group.kind == pb.ModelInstanceGroup.KIND_GPU
    ]
    for group in groups:
        group.gpus[:] = gpus
    return text_format.MessageToString(config) if groups else None
