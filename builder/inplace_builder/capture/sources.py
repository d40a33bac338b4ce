"""Where the files of a decoder are: a folder, a GGUF file, a cache of downloads, an adapter."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from inplace_builder.capture.lora import ADAPTER_CONFIG, ADAPTER_FILES, base_model
from inplace_builder.errors import BuildError

_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*(?<!\.gguf)")
"""Ids of the Hugging Face Hub; the oldest models have no organisation (``gpt2``)."""


@dataclass(frozen=True)
class ModelFiles:
    """The files of a decoder on this machine.

    Attributes:
        name: what the model is called, for people.
        folder: the folder with its configuration and weights.
        gguf: the name of the GGUF file there that has both; None if there is none.
        adapter: the folder of the LoRA adapter to merge, which may be ``folder``.
    """

    name: str
    folder: Path
    gguf: str | None = None
    adapter: Path | None = None

    @contextmanager
    def without_adapter(self) -> Iterator[Path]:
        """The folder without the adapter's files, which transformers would load where peft is."""
        if self.adapter != self.folder:
            yield self.folder
            return
        with TemporaryDirectory() as view:
            for path in self.folder.iterdir():
                if path.name not in ADAPTER_FILES:
                    (Path(view) / path.name).symlink_to(path.resolve())
            yield Path(view)


def locate_model(source: Path) -> ModelFiles:
    """Find the files of a model.

    Args:
        source: a folder of a model, of a LoRA adapter or of the cache of ``hf download``, a GGUF
            file, or the id of a model on the Hugging Face Hub that is in that cache.

    Raises:
        BuildError: there are none, or an adapter's base is not on this machine.
    """
    if not source.exists():
        return _cached(str(source)) or _missing(source)
    if (source / "snapshots").is_dir():
        return locate_model(_snapshot(source))
    if source.is_dir() and (source / ADAPTER_CONFIG).is_file():
        if any(_has_weights(source)):
            files = _model_files(source)
            return ModelFiles(f"{files.name} with its adapter", source, files.gguf, source)
        base = _base_files(source)
        return ModelFiles(f"{source.name} on {base.name}", base.folder, base.gguf, source)
    if source.is_dir() and (alone := [n for n in ADAPTER_FILES if (source / n).exists()]):
        raise BuildError(
            f"{source} holds {', '.join(alone)} without {ADAPTER_CONFIG}, which says how to merge "
            f"it; add that file, or remove the adapter"
        )
    return _model_files(source)


def _model_files(source: Path) -> ModelFiles:
    """The files of a model in a folder, or in a GGUF file."""
    name = source.name
    if source.parent.name == "snapshots" and source.parent.parent.name.startswith("models--"):
        hub_id = "/".join(source.parent.parent.name.split("--")[1:])
        name = f"{hub_id} at {source.name[:12]}"
    if source.is_dir() and (source / "config.json").is_file():
        return ModelFiles(name, source)
    folder = source if source.is_dir() else source.parent
    files = sorted(folder.glob("*.gguf")) if source.is_dir() else [source]
    if len(files) == 1 and files[0].suffix == ".gguf":
        return ModelFiles(name, folder, files[0].name)
    content = (
        f"{len(files)} GGUF files; name one"
        if len(files) > 1
        else "neither config.json nor a GGUF file"
    )
    raise BuildError(f"{source} is not a model: it holds {content}")


def _has_weights(folder: Path) -> Iterator[Path]:
    for pattern in ("model*.safetensors", "pytorch_model*.bin", "*.gguf"):
        yield from folder.glob(pattern)


def _base_files(adapter: Path) -> ModelFiles:
    """The model that an adapter was trained on."""
    base = base_model(adapter)
    for folder in (Path(base), adapter / base):
        if folder.is_dir() and folder.resolve() != adapter.resolve():
            if (folder / ADAPTER_CONFIG).is_file():
                raise BuildError(
                    f"the base {folder} of the adapter {adapter} has an adapter itself; merge that "
                    f"one first (peft: merge_and_unload, then save_pretrained)"
                )
            return locate_model(folder)
    if cached := _cached(base):
        return cached
    fetch = f"fetch it with `hf download {base}`, " if _HUB_ID.fullmatch(base) else ""
    raise BuildError(
        f"the adapter in {adapter} was trained on {base!r}, which is not on this machine: {fetch}"
        f"copy the adapter's files beside the model's weights, or name the model's folder as "
        f"base_model_name_or_path in {ADAPTER_CONFIG}"
    )


def _missing(source: Path) -> ModelFiles:
    """Refuse a source that does not exist."""
    if _HUB_ID.fullmatch(str(source)):
        raise BuildError(
            f"{source} is not a folder here, and nothing is downloaded. If it is a model of the "
            f"Hugging Face Hub, fetch it with `hf download {source}`, then build it by that name "
            f"or from the folder that the command prints"
        )
    raise BuildError(
        f"{source} does not exist; give the folder of a Hugging Face model, or a GGUF file. "
        f"`hf download ORGANISATION/NAME` fetches one from the Hugging Face Hub"
    )


def _cached(hub_id: str) -> ModelFiles | None:
    """The model of that id in the cache of ``hf download``; None if it is not there."""
    from huggingface_hub import constants

    if not _HUB_ID.fullmatch(hub_id):
        return None
    folder = Path(constants.HF_HUB_CACHE) / f"models--{hub_id.replace('/', '--')}"
    return locate_model(folder) if (folder / "snapshots").is_dir() else None


def _snapshot(folder: Path) -> Path:
    """The revision ``main`` of a model in the cache's layout, or the only one that is there."""
    reference = folder / "refs" / "main"
    if reference.is_file():
        snapshot = folder / "snapshots" / reference.read_text().strip()
        if snapshot.is_dir():
            return snapshot
    snapshots = sorted(path for path in (folder / "snapshots").iterdir() if path.is_dir())
    if len(snapshots) != 1:
        raise BuildError(
            f"{folder} holds {len(snapshots)} revisions and none is its main; give one of "
            f"{[str(path) for path in snapshots]}"
            if snapshots
            else f"{folder} holds no revision: the download was not finished"
        )
    return snapshots[0]
