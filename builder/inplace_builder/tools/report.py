"""What a person is shown of an engine: the summary after a build, and ``inplace inspect``."""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from inplace.schema.served import Manifest
from inplace.schema.specs import StateSpec
from rich.filesize import decimal
from rich.table import Table


def summary(manifest: Manifest, output: Path) -> Table:
    """States, bytes a slot, the arena and where the model is."""
    table = Table.grid(padding=(0, 2))
    table.add_row(
        "model",
        f"{manifest.name} ({manifest.engine.kind}, {manifest.engine.dtype}, {manifest.engine.device})",
    )
    for line in _groups(manifest.states):
        table.add_row("states", line)
    table.add_row(
        "a slot",
        f"{decimal(manifest.slot_bytes)} ({manifest.slot_bytes:,} bytes), capacity {manifest.capacity or 'unlimited'}",
    )
    table.add_row(
        "arena", f"{manifest.slots} slots, {decimal(arena_bytes(manifest, manifest.slots))}"
    )
    table.add_row("engine", decimal(manifest.engine.bytes))
    table.add_row(
        "verified",
        f"{manifest.verified}, largest relative error {manifest.built_with.get('verified_error', '?')}",
    )
    table.add_row("in", str(output))
    return table


def arena_bytes(manifest: Manifest, slots: int) -> int:
    """Bytes that so many slots take: a state that a TensorRT engine copies (kind ``copy``) lies in two buffers."""
    copied = {
        alias.input
        for program in manifest.programs
        for alias in program.aliases
        if alias.kind == "copy"
    }
    return slots * sum(
        state.slot_bytes * (2 if state.name in copied else 1) for state in manifest.states
    )


def slots_in(manifest: Manifest, memory: int) -> int:
    """Most slots whose states fit into so many bytes beside the engine's files, which hold its weights."""
    weights = manifest.engine.plan.weights if manifest.engine.plan is not None else None
    files = manifest.engine.bytes + (weights.bytes if weights is not None else 0)
    each = arena_bytes(manifest, 1)
    return max(0, memory - files) // each if each else 0


def details(manifest: Manifest, folder: Path, memory: float | None = None) -> Iterator[Table]:
    """Everything the manifest says, a table a subject.

    Args:
        manifest: of the engine.
        folder: where it is.
        memory: GiB of which to say how many slots they hold.
    """
    yield summary(manifest, folder)
    if memory is not None:
        size = Table.grid(padding=(0, 2))
        size.add_row(
            f"{memory:g} GiB",
            f"at most {slots_in(manifest, int(memory * 2**30)):,} slots beside the engine; its scratch memory comes off",
        )
        yield size
    for program in manifest.programs:
        table = Table(
            title=f"program {program.name}: {program.row_layout}, at most {program.max_rows} rows, {program.chunk} tokens a row"
        )
        for heading in ("tensor", "", "role", "dtype", "shape of a request", "limits"):
            table.add_column(heading)
        for way, specs in (("in", program.inputs), ("out", program.outputs)):
            for spec in specs:
                limits = (
                    f"{spec.minimum} … {spec.maximum}"
                    if spec.maximum is not None
                    else "on request"
                    if spec.on_request
                    else ""
                )
                table.add_row(spec.name, way, spec.role, spec.dtype, str(list(spec.shape)), limits)
        yield table
        aliases = Table(title="aliases: output@input@kind, and why this mechanism")
        aliases.add_column("alias", no_wrap=True)
        aliases.add_column("because")
        reasons = {entry.state: entry.reason for entry in manifest.lowering}
        for because, group in groupby(program.aliases, key=lambda alias: reasons[alias.input]):
            listed = [str(alias) for alias in group]
            aliases.add_row(
                "\n".join(
                    listed
                    if len(listed) < 5
                    else [listed[0], f"… {len(listed) - 2} more", listed[-1]]
                ),
                because,
            )
        yield aliases
    built = Table.grid(padding=(0, 2))
    for key, value in sorted(manifest.built_with.items()):
        built.add_row(key, value)
    yield built


def _groups(states: tuple[StateSpec, ...]) -> Iterator[str]:
    """States that differ by name only, as one line."""
    for (shape, dtype, update, axis), group in groupby(
        states, key=lambda s: (s.shape, s.dtype, s.update, s.axis)
    ):
        listed = list(group)
        names = (
            listed[0].name
            if len(listed) == 1
            else f"{listed[0].name} … {listed[-1].name} ({len(listed)})"
        )
        grows = f" along axis {axis}" if axis is not None else ""
        yield f"{names}: {list(shape)} {dtype}, {update}{grows}"
