"""Tables that describe an engine: the summary after a build, and ``inplace inspect``."""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from inplace.engines.gpus import arena_bytes, max_slots
from inplace.schema.programs import CompiledProgram, Program
from inplace.schema.served import Manifest
from inplace.schema.specs import StateSpec, TensorSpec, Update
from rich.filesize import decimal
from rich.table import Table

NOTES = ["adapter", "quantization", "weights", "cache", "tokenizer", "latents", "capture", "draft"]
"""What a summary has of the notes of a build."""


def summary_table(manifest: Manifest, folder: Path | str) -> Table:
    """States, bytes of a slot and of a position, the arena, and where the model is.

    Args:
        manifest: of the engine.
        folder: the model's folder, which is printed.
    """
    engine = manifest.programs[0].engine
    table = Table.grid(padding=(0, 2))
    table.add_row("model", f"{manifest.name} ({engine.kind}, {engine.dtype}, {engine.device})")
    for line in _describe_states(manifest.states):
        table.add_row("states", line)
    size = f"{decimal(manifest.slot_bytes)} ({manifest.slot_bytes:,} bytes)"
    table.add_row("a slot", f"{size}, capacity {manifest.capacity or 'unlimited'}")
    if position := position_bytes(manifest):
        table.add_row("a position", f"{position:,} bytes")
    arena = decimal(arena_bytes(manifest, manifest.slots))
    table.add_row("arena", f"{manifest.slots} slots, {arena}")
    engine_bytes = sum(
        manifest.file(name).bytes for name in {each.engine.file for each in manifest.programs}
    )
    table.add_row("engine", decimal(engine_bytes))
    error = manifest.built_with.get("verified_error", "?")
    table.add_row("verified", f"{manifest.verified}, largest relative error {error}")
    for note in NOTES:
        if (text := manifest.built_with.get(note)) is not None:
            table.add_row(note, text)
    table.add_row("in", str(folder))
    return table


def position_bytes(manifest: Manifest) -> int:
    """Bytes that a slot grows by for each position of the capacity; rings and others do not."""
    return sum(
        state.slot_bytes // state.shape[state.axis]
        for state in manifest.states
        if state.update is Update.APPEND and state.axis is not None
    )


def detail_tables(
    manifest: Manifest, folder: Path | str, memory: float | None = None
) -> Iterator[Table]:
    """Everything that the manifest contains, one table a subject.

    Args:
        manifest: of the engine.
        folder: where it is.
        memory: GiB; adds how many slots fit into them.
    """
    yield summary_table(manifest, folder)
    if memory is not None:
        slots = max_slots(manifest, int(memory * 2**30))
        size = Table.grid(padding=(0, 2))
        size.add_row(
            f"{memory:g} GiB",
            f"at most {slots:,} slots beside the engine, minus its scratch memory",
        )
        yield size
    for program in manifest.programs:
        yield _tensor_table(program)
        yield _alias_table(program)
    built = Table.grid(padding=(0, 2))
    for key, value in sorted(manifest.built_with.items()):
        built.add_row(key, value)
    yield built


def _tensor_table(program: Program) -> Table:
    table = Table(
        title=f"program {program.name}: {program.row_layout}, at most {program.max_rows} rows, "
        f"{program.chunk} tokens a row"
    )
    for heading in ("tensor", "", "role", "dtype", "shape of a request", "limits"):
        table.add_column(heading)
    for direction, specs in (("in", program.inputs), ("out", program.outputs)):
        for spec in specs:
            shape = str(list(spec.shape))
            table.add_row(spec.name, direction, spec.role, spec.dtype, shape, _limits(spec))
    return table


def _limits(spec: TensorSpec) -> str:
    if spec.maximum is not None:
        return f"{spec.minimum} … {spec.maximum}"
    return "on request" if spec.on_request else ""


def _alias_table(program: CompiledProgram) -> Table:
    table = Table(title="aliases: output@input@kind, and the reason for this mechanism")
    table.add_column("alias", no_wrap=True)
    table.add_column("reason")
    reasons = {entry.state: entry.reason for entry in program.lowering}
    for reason, group in groupby(program.aliases, key=lambda alias: reasons[alias.input]):
        aliases = [str(alias) for alias in group]
        if len(aliases) >= 5:
            aliases = [aliases[0], f"… {len(aliases) - 2} more", aliases[-1]]
        table.add_row("\n".join(aliases), reason)
    return table


def _describe_states(states: tuple[StateSpec, ...]) -> Iterator[str]:
    """One line for consecutive states that differ only by name."""
    for (shape, dtype, update, axis), group in groupby(
        states, key=lambda state: (state.shape, state.dtype, state.update, state.axis)
    ):
        names = [state.name for state in group]
        title = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]} ({len(names)})"
        grows = f" along axis {axis}" if axis is not None else ""
        yield f"{title}: {list(shape)} {dtype}, {update}{grows}"
