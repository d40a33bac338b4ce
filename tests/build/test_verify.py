"""Verification: an engine that does not compute what its model computes is not written."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from inplace.operators import read, update
from inplace.operators.state import write
from inplace.schema.specs import Dtype, Role, StateSpec, TensorSpec, Update
from inplace_builder import Capture, DecoderOptions, capture_decoder, capture_module
from inplace_builder.capture.capture import control_input
from inplace_builder.compare import TOLERANCE
from inplace_builder.errors import BuildError
from inplace_builder.served.build import write_engine
from inplace_builder.served.decoder import build_decoder
from inplace_builder.served.options import BuildOptions
from inplace_builder.served.verify import rank_limits
from support import lowering
from support.experts import moe_decoder
from support.models import accumulator, captured, tiny_llama
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

OPTIONS = BuildOptions(slots=4, max_rows=4, capacity=1)
SPARE_SLOT = 4
"""A slot that none of the verified sequences owns."""


class Sum(torch.nn.Module):
    """Correct, for numbers of any type: the sum of all values."""

    def forward(self, value: Tensor, slots: Tensor, total: Tensor) -> Tensor:
        sums = read(total, slots) + value
        update(total, slots, sums)
        return sums


class WritesNextSlot(torch.nn.Module):
    def forward(self, value: Tensor, slots: Tensor, total: Tensor) -> Tensor:
        sums = read(total, slots) + value
        update(total, slots + 1, sums)
        return sums


class AlsoWritesASpareSlot(torch.nn.Module):
    """Its outputs are right; beside its own slots it writes one that no sequence owns."""

    def forward(self, value: Tensor, slots: Tensor, total: Tensor) -> Tensor:
        sums = read(total, slots) + value
        update(total, slots, sums)
        update(total, slots.clamp(min=SPARE_SLOT), sums)
        return sums


class WritesSlotZero(torch.nn.Module):
    """All rows share slot 0: right for one sequence, wrong for two."""

    def forward(self, value: Tensor, slots: Tensor, total: Tensor) -> Tensor:
        sums = read(total, slots * 0) + value
        update(total, slots * 0, sums)
        return sums


class ForgetsToWriteFirstRow(torch.nn.Module):
    """The first row is a null row: no other slot is touched, but the first row's sum is lost."""

    def forward(self, value: Tensor, slots: Tensor, total: Tensor) -> Tensor:
        sums = read(total, slots) + value
        update(total, torch.where(slots == 0, -1, slots), sums)
        return sums


class WritesOutsideTheArena(torch.nn.Module):
    def forward(self, value: Tensor, slots: Tensor, total: Tensor) -> Tensor:
        sums = read(total, slots) + value
        update(total, slots + 100, sums)
        return sums


class Counter(torch.nn.Module):
    """The number of requests, an integer."""

    def forward(self, value: Tensor, slots: Tensor, total: Tensor) -> Tensor:
        counts = read(total, slots) + value
        update(total, slots, counts)
        return counts


def refused(capture: Capture, folder: Path, text: str, options: BuildOptions = OPTIONS) -> None:
    """The engine is refused with this text, and nothing is written."""
    folder.mkdir(exist_ok=True)
    with pytest.raises(BuildError, match=text):
        write_engine(capture, folder / "model", options)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "module", [WritesNextSlot(), AlsoWritesASpareSlot()], ids=lambda module: type(module).__name__
)
def test_a_graph_that_writes_a_slot_outside_the_step_is_refused(
    tmp_path: Path, module: torch.nn.Module
) -> None:
    refused(captured(module), tmp_path, "changed bytes of state total outside the rows of its step")


def test_an_engine_that_samples_for_another_position_is_refused(tmp_path: Path) -> None:
    capture = lowering.captured("llama")
    named = {node.name: node for node in capture.exported.graph.nodes}
    (node,) = capture.exported.graph.find_nodes(
        op="call_function", target=torch.ops.inplace.sample.options
    )
    node.args = (*node.args[:5], named["write_indices"], *node.args[6:])
    capture.exported.graph_module.recompile()
    options = BuildOptions(
        slots=4, max_rows=lowering.ROWS, capacity=lowering.CAPACITY, chunk=lowering.CHUNK
    )
    refused(
        capture,
        tmp_path,
        r"output next_token of sequence [23] after \d+ tokens is \[\d+\], expected \[\d+\]",
        options,
    )


@pytest.mark.parametrize(
    "module", [WritesSlotZero(), ForgetsToWriteFirstRow()], ids=lambda module: type(module).__name__
)
def test_a_graph_that_mixes_or_loses_rows_is_refused(
    tmp_path: Path, module: torch.nn.Module
) -> None:
    refused(
        captured(module),
        tmp_path,
        r"outside the rows of its step|output sum of sequence \d after \d tokens differs from the",
    )


@pytest.mark.parametrize(
    "change",
    [lambda x: x + 0.01, lambda x: x * float("nan"), lambda x: x[:2]],
    ids=["more", "nan", "shape"],
)
def test_an_engine_whose_numbers_are_not_the_model_s_is_refused(
    tmp_path: Path, change: object
) -> None:
    capture = accumulator()

    def other(requests: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        expected = dict(capture.reference(requests))
        return expected | {"sum": change(expected["sum"])}  # type: ignore[operator]

    refused(
        replace(capture, reference=other),
        tmp_path,
        "output sum of sequence 1 .*(differs from the model by|the model's is)",
    )


def test_an_integer_that_is_off_by_one_is_refused(tmp_path: Path) -> None:
    capture = accumulator()

    def other(requests: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        expected = dict(capture.reference(requests))
        return expected | {"values": expected["values"] + 1}

    refused(
        replace(capture, reference=other),
        tmp_path,
        r"output values of sequence 1 after 1 tokens is \[1\], expected \[2\]",
    )


@pytest.mark.slow
def test_a_decoder_verified_against_other_weights_is_refused(tmp_path: Path) -> None:
    options = DecoderOptions(capacity=32, max_rows=2, chunk=8)
    capture = capture_decoder(tiny_llama(tmp_path / "one"), options)
    other = tiny_llama(tmp_path / "other")
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    wrong = replace(capture, reference=capture_decoder(other, options).reference)
    refused(
        wrong,
        tmp_path / "repository",
        "output logits of sequence 1 .* differs from the model by",
        BuildOptions(capacity=32, chunk=8),
    )


@pytest.mark.parametrize("dtype", [Dtype.FLOAT32, Dtype.INT32], ids=["nan", "largest integer"])
def test_a_state_that_claims_to_need_no_reset_but_is_read_fresh_is_refused(
    tmp_path: Path, dtype: Dtype
) -> None:
    refused(
        captured(Sum(), reset=False, dtype=dtype),
        tmp_path,
        r"output sum of sequence 1 after 1 tokens (differs from the model by nan|is \[)",
    )


@pytest.mark.parametrize("dtype", [Dtype.FLOAT32, Dtype.INT32])
def test_the_same_module_builds_where_the_state_is_reset(tmp_path: Path, dtype: Dtype) -> None:
    manifest = write_engine(captured(Sum(), dtype=dtype), tmp_path / "model", OPTIONS)
    assert manifest.verified == "executed"
    assert float(manifest.built_with["verified_error"]) < 1e-6
    assert (tmp_path / "model" / "config.pbtxt").is_file()


def test_an_engine_that_fails_when_it_is_warmed_is_refused(tmp_path: Path) -> None:
    refused(
        captured(WritesOutsideTheArena()),
        tmp_path,
        r"fails in its first step \(IndexError: index 99 is out of bounds",
    )


RING = 12


def sliding_decoder(chunk: int) -> Capture:
    """A decoder with one layer whose window is a ring of at least `RING` positions."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=RING,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    return capture_decoder(
        MistralForCausalLM(config).eval(), DecoderOptions(capacity=64, max_rows=2, chunk=chunk)
    )


@pytest.mark.parametrize("chunk", [1, 8])
def test_a_ring_operator_that_is_wrong_only_once_it_wraps_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    capture = sliding_decoder(chunk)
    assert {state.shape[1] for state in capture.states} == {RING + chunk - 1}
    options = BuildOptions(capacity=64, chunk=chunk)
    write_engine(capture, tmp_path / "right" / "model", options)

    def drops_wrapped(slot: Tensor, new: Tensor, start: int, axis: int, *, ring: bool) -> None:
        if start < slot.shape[axis]:
            write(slot, new, start, axis, ring=ring)

    monkeypatch.setattr(sys.modules["inplace.operators.attention"], "write", drops_wrapped)
    refused(
        capture,
        tmp_path / "wrong",
        r"output logits of sequence \d after .* differs from the model",
        options,
    )


class Weighted(torch.nn.Module):
    """Adds a value as often as its row is valid."""

    def forward(self, value: Tensor, slots: Tensor, lengths: Tensor, total: Tensor) -> Tensor:
        sums = read(total, slots) + value * lengths.unsqueeze(1)
        update(total, slots, sums)
        return sums * 1.0


def test_the_runtime_fills_the_valid_lengths_of_a_module(tmp_path: Path) -> None:
    capture = capture_module(
        Weighted(),
        inputs=[
            TensorSpec(name="value", role=Role.ROW, dtype=Dtype.FLOAT32, shape=(4,)),
            control_input("slots", Role.SLOTS),
            control_input("lengths", Role.VALID_LENGTHS),
        ],
        outputs=[TensorSpec(name="sum", role=Role.VALUE, dtype=Dtype.FLOAT32, shape=(4,))],
        states=[
            StateSpec(
                name="total",
                shape=(4,),
                dtype=Dtype.FLOAT32,
                update=Update.REPLACE,
                initial="start",
            )
        ],
        max_rows=4,
        initial={"start": torch.arange(4.0)},
    )
    manifest = write_engine(capture, tmp_path / "model", OPTIONS)
    assert manifest.built_with["verified_error"] == "0.0e+00"
    assert [spec.name for spec in manifest.program("step").client_inputs] == ["value"]


class Latest(torch.nn.Module):
    """The mean of the last `RING` values."""

    def forward(
        self, value: Tensor, slots: Tensor, write_indices: Tensor, values: Tensor
    ) -> Tensor:
        update(values, slots, value.unsqueeze(1), None, write_indices, axis=1, ring=True)
        return read(values, slots).mean(1)


def test_the_ring_of_a_module_is_verified_beyond_its_end(tmp_path: Path) -> None:
    """The engine drops what has wrapped; the model does not."""
    capture = capture_module(
        Latest(),
        inputs=[
            TensorSpec(name="value", role=Role.ROW, dtype=Dtype.FLOAT32, shape=(4,)),
            control_input("slots", Role.SLOTS),
            control_input("write_indices", Role.WRITE_INDICES),
        ],
        outputs=[TensorSpec(name="mean", role=Role.VALUE, dtype=Dtype.FLOAT32, shape=(4,))],
        states=[
            StateSpec(
                name="values", shape=(RING, 4), dtype=Dtype.FLOAT32, update=Update.RING, axis=0
            )
        ],
        max_rows=4,
    )
    write_engine(capture, tmp_path / "right" / "model", OPTIONS)
    graph = capture.exported.graph
    [written] = graph.find_nodes(op="call_function", target=torch.ops.inplace.update.default)
    with graph.inserting_before(written):
        beyond = graph.call_function(torch.ops.aten.ge.Scalar, (written.args[4], RING))
        slots = graph.call_function(
            torch.ops.aten.masked_fill.Scalar, (written.args[1], beyond, -1)
        )
    for node in (beyond, slots):
        node.meta["val"] = written.args[1].meta["val"]
    beyond.meta["val"] = beyond.meta["val"].bool()
    written.update_arg(1, slots)
    capture.exported.graph_module.recompile()
    refused(
        capture,
        tmp_path / "wrong",
        f"output mean of sequence 1 after {RING + 1} tokens differs from the model",
    )


@pytest.mark.parametrize("dtype", [Dtype.FLOAT32, Dtype.BFLOAT16])
def test_a_built_decoder_records_its_error_and_it_is_within_the_tolerance_of_its_type(
    tmp_path: Path, dtype: Dtype
) -> None:
    tiny_llama(tmp_path / "llama")
    manifest = build_decoder(
        tmp_path / "llama", tmp_path / "model", BuildOptions(dtype=dtype, capacity=32, chunk=8)
    )
    assert manifest.program("step").engine.dtype is dtype
    assert (
        float(manifest.built_with["verified_error"])
        < {Dtype.FLOAT32: 1e-5, Dtype.BFLOAT16: 5e-2}[dtype]
    )


@pytest.mark.parametrize(("factor", "accepted"), [(1.0, True), (1.2, False)])
def test_an_error_beyond_the_tolerance_is_compared_with_the_model_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float, accepted: bool
) -> None:
    """An engine's error may be of the size of the model's own rounding error, not larger."""
    monkeypatch.setitem(TOLERANCE, Dtype.BFLOAT16, 1e-7)
    model = tiny_llama(tmp_path / "llama").to(torch.bfloat16)
    capture = capture_decoder(model, DecoderOptions(capacity=32, max_rows=2, chunk=8))
    assert capture.float32_reference is not None
    precise = capture.float32_reference()
    assert model.dtype is torch.bfloat16

    def other(requests: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        return {
            name: value * factor if name == "logits" else value
            for name, value in precise(requests).items()
        }

    capture, options = (
        replace(capture, float32_reference=lambda: other),
        BuildOptions(dtype=Dtype.BFLOAT16, capacity=32, chunk=8, max_rows=2, slots=4),
    )
    if accepted:
        write_engine(capture, tmp_path / "model", options)
        return
    refused(
        replace(capture, reference=other),
        tmp_path / "repository",
        "logits of sequence 1 .* differs from the model by .*, "
        "and from the model in float32 by .*, where the model's own rounding",
        options,
    )


def test_a_model_that_chooses_experts_may_differ_as_much_as_its_other_roundings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine rounds otherwise than the model, and may choose other experts, as the model may."""
    monkeypatch.setitem(TOLERANCE, Dtype.BFLOAT16, 1e-7)
    model = moe_decoder("mixtral").to(torch.bfloat16)
    capture = capture_decoder(model, DecoderOptions(capacity=32, max_rows=2, chunk=8))
    options = BuildOptions(dtype=Dtype.BFLOAT16, capacity=32, chunk=8, max_rows=2, slots=4)
    assert capture.float32_reference is not None
    precise = capture.float32_reference()
    exact = replace(capture, reference=precise, float32_reference=lambda: precise)
    write_engine(exact, tmp_path / "model", options)
    with pytest.raises(BuildError, match="where the model's own rounding makes 0"):
        write_engine(replace(exact, perturbed_reference=None), tmp_path / "refused", options)


def test_a_rank_may_differ_as_much_as_scores_do() -> None:
    """Not by the tolerance alone: a cache of 8-bit floats moves scores by more than that."""
    logits = torch.tensor([-10.0, 1.0, 1.03, 1.2, 5.0])
    assert rank_limits(logits, 1, 1e-4) == (4, 4)
    assert rank_limits(logits, 1, 2e-3) == (3, 4)
    assert rank_limits(logits, 2, 2e-3) == (3, 4)
    assert rank_limits(logits, 4, 2e-3) == (1, 1)
