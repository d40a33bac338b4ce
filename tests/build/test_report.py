"""The report of an engine's memory."""

import subprocess
import sys
from pathlib import Path

from inplace.engines.gpus import arena_bytes, max_slots
from inplace.schema.artifacts import Plan, Profile
from inplace.schema.files import FileRecord
from inplace.schema.served import Manifest
from inplace.schema.specs import Update
from support.models import CAPACITY, SLOTS, Repository, open_instance

LAYERS, KV_HEADS, HEAD_DIM = 2, 2, 16
SLOT = 2 * LAYERS * KV_HEADS * HEAD_DIM * CAPACITY * 4
"""Keys and values of `models.tiny_llama` in float32."""


def test_a_slot_of_a_decoder_is_its_keys_and_values_at_full_capacity(
    repository: Repository,
) -> None:
    manifest = Manifest.load(repository.path / "llama" / "1")
    assert manifest.slot_bytes == SLOT
    assert (
        arena_bytes(manifest, SLOTS)
        == SLOTS * SLOT
        == open_instance(repository.path / "llama").arena.bytes
    )


def test_a_copied_state_counts_twice(repository: Repository) -> None:
    manifest = Manifest.load(repository.path / "llama" / "1")
    [program] = manifest.programs
    first, *rest = program.aliases
    copied = program.model_copy(
        update={"aliases": (first.model_copy(update={"kind": "copy"}), *rest)}
    )
    assert manifest.states[0].update is Update.APPEND
    one = next(state.slot_bytes for state in manifest.states if state.name == first.input)
    assert arena_bytes(manifest.model_copy(update={"programs": (copied,)}), 3) == 3 * (SLOT + one)


def test_the_engines_files_come_off_the_memory_that_slots_have(repository: Repository) -> None:
    manifest = Manifest.load(repository.path / "llama" / "1")
    program = manifest.program("step")
    files = manifest.file(program.engine.file).bytes
    assert max_slots(manifest, files + 5 * SLOT) == 5
    assert max_slots(manifest, files + 5 * SLOT - 1) == 4
    assert max_slots(manifest, files - 1) == 0
    plan = Plan(
        flavor="tensorrt",
        version="10.6.0",
        gpu="",
        compute_capability="9.0",
        profiles=(Profile(rows=(1, 1), tokens=(1, 1)),),
        weights="weights.safetensors",
    )
    engine = program.engine.model_copy(update={"plan": plan})
    weights = FileRecord(name="weights.safetensors", bytes=3 * SLOT, sha256="0" * 64)
    beside = manifest.model_copy(
        update={
            "programs": (program.model_copy(update={"engine": engine}),),
            "files": (*manifest.files, weights),
        }
    )
    assert max_slots(beside, files + 5 * SLOT) == 2


def test_inspect_says_how_many_slots_fit(repository: Repository) -> None:
    model = repository.path / "llama"
    inplace = Path(sys.executable).with_name("inplace")
    result = subprocess.run(
        [inplace, "inspect", model, "--memory", "0.5"], capture_output=True, text=True, check=True
    )
    expected = max_slots(Manifest.load(model / "1"), 2**29)
    assert f"0.5 GiB  at most {expected:,} slots beside the engine" in result.stdout
