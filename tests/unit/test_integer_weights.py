"""Packed integers of GPTQ and AWQ, against a packer that is written from their publications."""

from dataclasses import replace

import pytest
import torch
from inplace_builder.capture.integer_weights import (
    IntegerFormat,
    dequantize_awq,
    dequantize_gptq,
    integer_format,
    read_layer,
    unpack,
)
from support.integer_packing import groups_of, pack_awq, pack_gptq, quantize
from torch import Tensor

GPTQ = IntegerFormat("gptq", 4, 32, zero_offset=1)
AWQ = IntegerFormat("awq", 4, 32)


def weight(outputs: int = 32, inputs: int = 96) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize(("size", "act_order"), [(32, False), (32, True), (-1, False)])
def test_gptq(bits: int, symmetric: bool, v2: bool, size: int, act_order: bool) -> None:
    group = groups_of(96, size, act_order=act_order)
    integers, zeros, scales, whole = quantize(weight(), group, bits, symmetric=symmetric)
    parts = pack_gptq(integers, zeros, scales, group, bits, v2=v2)
    form = IntegerFormat("gptq", bits, None if size == -1 else size, zero_offset=0 if v2 else 1)
    assert torch.equal(dequantize_gptq(**parts, form=form), whole)
    if not act_order:
        del parts["g_idx"]
        assert torch.equal(dequantize_gptq(**parts, form=form), whole)
    assert (whole - weight()).abs().max() < scales.max()  # a step of the integers


def test_a_zero_point_of_zero_wraps_around_in_gptq() -> None:
    """Less one it is all ones; weights that are all positive have it."""
    group = groups_of(96, 32)
    integers, zeros, scales, whole = quantize(weight().abs(), group, 4, symmetric=False)
    assert not zeros.any()
    parts = pack_gptq(integers, zeros, scales, group, 4, v2=False)
    assert set(parts["qzeros"].flatten().tolist()) == {-1}
    assert torch.equal(dequantize_gptq(**parts, form=GPTQ), whole)


def test_layers_of_gptq_may_have_bits_of_their_own() -> None:
    group = groups_of(96, 32)
    integers, zeros, scales, whole = quantize(weight(), group, 8, symmetric=True)
    parts = pack_gptq(integers, zeros, scales, group, 8, v2=False)
    assert torch.equal(dequantize_gptq(**parts, form=replace(GPTQ, varies=True)), whole)
    with pytest.raises(ValueError, match="do not fit together with 4 bits"):
        dequantize_gptq(**parts, form=GPTQ)


@pytest.mark.parametrize("size", [32, -1])
def test_awq(size: int) -> None:
    group = groups_of(96, size)
    integers, zeros, scales, whole = quantize(weight(), group, 4, symmetric=False)
    form = replace(AWQ, group_size=None if size == -1 else size)
    assert torch.equal(dequantize_awq(**pack_awq(integers, zeros, scales), form=form), whole)


def test_the_sign_bit_of_a_word_is_a_bit() -> None:
    words = torch.tensor([[-1, 0x12345678]], dtype=torch.int32)
    assert unpack(words, 4).tolist() == [[15] * 8 + [8, 7, 6, 5, 4, 3, 2, 1]]
    assert unpack(words, 8).tolist() == [[255] * 4 + [0x78, 0x56, 0x34, 0x12]]


def test_what_does_not_fit_is_refused() -> None:
    group = groups_of(96, 32)
    integers, zeros, scales, _ = quantize(weight(), group, 4, symmetric=False)
    parts = pack_gptq(integers, zeros, scales, group, 4, v2=False)
    for change, message in (
        ({"qzeros": parts["qzeros"][:2]}, "do not fit together with 4 bits"),
        ({"g_idx": group[:90].int()}, "does not name one of 3 groups for each of 96 inputs"),
        ({"g_idx": (group + 1).int()}, "does not name one of 3 groups"),
        ({"scales": scales[0]}, "expected one of each group and output"),
    ):
        with pytest.raises(ValueError, match=message):
            dequantize_gptq(**{**parts, **change}, form=GPTQ)
    packed = pack_awq(integers, zeros, scales)
    with pytest.raises(ValueError, match="3 groups of 64 do not have 96 inputs"):
        dequantize_awq(**packed, form=replace(AWQ, group_size=64))
    with pytest.raises(ValueError, match="do not fit together with 4 bits"):
        dequantize_awq(**{**packed, "qweight": packed["qweight"][:, :3]}, form=AWQ)
    with pytest.raises(ValueError, match=r"there is no up\.qzeros"):
        read_layer("up", {"up.qweight": parts["qweight"], "up.scales": scales}, GPTQ)


@pytest.mark.parametrize(
    ("method", "fields", "expected"),
    [
        ("gptq", {"bits": 4, "group_size": 128}, IntegerFormat("gptq", 4, 128, 1)),
        ("gptq", {"bits": 8, "group_size": -1}, IntegerFormat("gptq", 8, None, 1)),
        ("gptq", {"bits": 3, "checkpoint_format": "gptq_v2"}, IntegerFormat("gptq", 3, 128)),
        ("awq", {"bits": 4, "group_size": 64, "version": "gemm"}, IntegerFormat("awq", 4, 64)),
        ("awq", {"w_bit": 4, "q_group_size": 64, "version": "GEMM"}, IntegerFormat("awq", 4, 64)),
    ],
)
def test_formats(method: str, fields: dict[str, object], expected: IntegerFormat) -> None:
    assert integer_format(method, fields) == expected


@pytest.mark.parametrize(
    ("method", "fields", "reason"),
    [
        ("gptq", {"bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        ("gptq", {"bits": 4, "is_marlin_format": True}, "checkpoint_format is 'marlin'"),
        ("gptq", {"bits": 5}, "5 bits"),
        ("gptq", {"bits": 4, "group_size": 0}, "group_size is 0"),
        ("awq", {"bits": 8}, "8 bits"),
        ("awq", {"bits": 4, "version": "gemv"}, "layout is 'gemv'"),
        ("awq", {"bits": 4, "version": "gemv_fast"}, "layout is 'gemv_fast'"),
        ("awq", {"bits": 4, "version": "gemm", "backend": "llm-awq"}, "of llm-awq"),
    ],
)
def test_other_layouts_are_refused_by_name(
    method: str, fields: dict[str, object], reason: str
) -> None:
    assert reason in str(integer_format(method, fields))
