"""What plugins answer to TensorRT: shapes, dtypes, aliases; and how a plan stores them.

The base classes are those of TensorRT for RTX. Its networks take no plugins, so none runs here.
"""

from dataclasses import replace

import inplace.plugins
import numpy as np
import pytest
import torch
from inplace.operators import ACTIVATIONS
from inplace.plugins import (
    OPERATIONS,
    ArgmaxOperation,
    AttentionOperation,
    CausalConv1dOperation,
    DeltaRuleOperation,
    GroupedLinearOperation,
    LinearOperation,
    LinearRecurrenceOperation,
    Operation,
    RmsNormOperation,
    SelectiveScanOperation,
    UpdateOperation,
    WeightedSumOperation,
    plugins,
)
from inplace.plugins.recurrences import RecurrentOperation
from inplace.trt import load_tensorrt

HALF, INT = torch.bfloat16, torch.int32
MERGED = AttentionOperation(
    heads=8, kv_heads=2, dim=64, value_dim=64, scale=0.125, max_rows=9, rotary=64, merged=True
)
SCALED = LinearOperation(
    inputs=4096, outputs=512, norm=True, scaled=True, scale_group=128, activation_rows=65
)
EXAMPLES: list[Operation] = [
    MERGED,
    AttentionOperation(
        heads=8,
        kv_heads=2,
        dim=96,
        value_dim=32,
        scale=0.3,
        max_rows=9,
        window=17,
        ring=True,
        softcap=30.5,
    ),
    AttentionOperation(
        heads=8, kv_heads=2, dim=64, value_dim=64, scale=0.125, max_rows=9, rotary=16
    ),
    AttentionOperation(
        heads=8, kv_heads=8, dim=64, value_dim=64, scale=1.0, max_rows=9, append=False, causal=False
    ),
    LinearOperation(inputs=576, outputs=3072, norm=True, eps=1e-5, activation="silu", gated=True),
    LinearOperation(inputs=576, outputs=960, bias=True, residual=True, activation="gelu_tanh"),
    LinearOperation(inputs=576, outputs=49152, norm=True, eps=1e-6, float_out=True),
    GroupedLinearOperation(inputs=2048, outputs=1536, experts=128, activation="silu", gated=True),
    GroupedLinearOperation(inputs=2880, outputs=5760, experts=32, bias=True, transposed=True),
    RmsNormOperation(width=128, eps=1e-6),
    ArgmaxOperation(max_rows=9),
    UpdateOperation(),
    UpdateOperation(axis=2, append=True, packed=True, ring=True, readers=2),
    AttentionOperation(
        heads=8, kv_heads=2, dim=64, value_dim=64, scale=0.125, max_rows=9, readers=2
    ),
    AttentionOperation(
        heads=64, kv_heads=8, dim=64, value_dim=64, scale=0.125, max_rows=9, sinks=True, readers=1
    ),
    CausalConv1dOperation(bias=True, silu=True),
    SelectiveScanOperation(skip=True, readers=1),
    DeltaRuleOperation(),
    LinearRecurrenceOperation(readers=2),
    WeightedSumOperation(width=2048),
    AttentionOperation(
        heads=8,
        kv_heads=2,
        dim=64,
        value_dim=64,
        scale=0.125,
        max_rows=9,
        attention_chunk=8192,
        bias_heads=8,
        readers=1,
    ),
]


@pytest.mark.parametrize("operation", [*EXAMPLES, SCALED], ids=str)
def test_a_plan_restores_every_field(operation: Operation) -> None:
    owner = plugins(load_tensorrt("tensorrt_rtx"))
    stored = owner.make(operation).get_fields_to_serialize()
    assert {field.type for field in stored} == {owner.tensorrt.api.PluginFieldType.INT32}
    creators = {
        creator.name: creator for creator in owner.tensorrt.api.get_plugin_registry().all_creators
    }
    restored = creators[operation.name].create_plugin("x", stored, None).operation
    assert type(restored) is type(operation)
    rounded = {
        name: float(np.float32(value))
        for name, value in vars(operation).items()
        if isinstance(value, float)
    }
    assert restored == replace(operation, **rounded)


def test_every_kind_is_registered_under_its_name() -> None:
    owner = plugins(load_tensorrt("tensorrt_rtx"))
    names = {creator.name for creator in owner.tensorrt.api.get_plugin_registry().all_creators}
    assert set(OPERATIONS) <= names
    kinds = [kind for kind in vars(inplace.plugins).values() if isinstance(kind, type)]
    ours = {kind for kind in kinds if issubclass(kind, Operation) and kind is not Operation}
    assert len(ours) > 10
    assert ours <= set(OPERATIONS.values())
    assert plugins(load_tensorrt("tensorrt_rtx")) is owner


def test_attention_aliases_both_states() -> None:
    shapes = [[1, 7, 768], [1, 7, 64], [1, 7, 64], [5, 2, 128, 64], [5, 2, 128, 64], [3], [4], [3]]
    assert MERGED.input_count == len(shapes)
    assert MERGED.output_shapes(shapes) == [[1, 7, 512], [5, 2, 128, 64], [5, 2, 128, 64]]
    assert dict(MERGED.aliases) == {1: 3, 2: 4}
    plugin = plugins(load_tensorrt("tensorrt_rtx")).make(MERGED)
    assert [plugin.get_aliased_input(output) for output in range(3)] == [-1, 3, 4]
    assert plugin.num_outputs == 3
    separate = EXAMPLES[1]
    assert separate.output_shapes(
        [[7, 8, 96], [7, 2, 96], [7, 2, 32], [5, 2, 64, 96], [5, 2, 64, 32], [3], [4], [3]]
    )[0] == [7, 8, 32]


def test_attention_on_parts_takes_cos_and_sin_behind_them() -> None:
    parts = EXAMPLES[2]
    shapes = [
        [7, 8, 64],
        [7, 2, 64],
        [7, 2, 64],
        [1, 7, 16],
        [1, 7, 16],
        [5, 2, 128, 64],
        [5, 2, 128, 64],
        [3],
        [4],
        [3],
    ]
    assert parts.input_count == len(shapes)
    assert parts.output_shapes(shapes) == [[7, 8, 64], [5, 2, 128, 64], [5, 2, 128, 64]]
    assert dict(parts.aliases) == {1: 5, 2: 6}


def test_sinks_come_after_the_rows_and_have_any_float_type() -> None:
    with_sinks = EXAMPLES[14]
    assert with_sinks.input_count == 3 + 2 + 3 + 1 + 1
    before = [HALF] * 5 + [INT] * 3
    assert all(with_sinks.accepts(8, [*before, kind]) for kind in (HALF, torch.float32))
    assert not with_sinks.accepts(8, [*before, INT])
    assert with_sinks.accepts(9, [*before, torch.float32, INT]), "what was read before"
    assert with_sinks.accepts(10, [*before, torch.float32, INT, HALF])
    assert not with_sinks.accepts(10, [*before, torch.float32, INT, torch.float32])


def test_a_bias_comes_after_the_sinks_and_has_any_float_type() -> None:
    operation = replace(EXAMPLES[-1], sinks=True)  # type: ignore[call-arg]
    assert operation.input_count == EXAMPLES[-1].input_count + 1 == 3 + 2 + 3 + 2 + 1
    before = [*[HALF] * 5, *[INT] * 3, torch.float32]
    assert all(operation.accepts(9, [*before, kind]) for kind in (HALF, torch.float32))
    assert not operation.accepts(9, [*before, INT])
    assert operation.accepts(10, [*before, HALF, INT]), "what was read before"


def test_caches_of_8_bit_floats_are_words_and_have_scales_at_the_end() -> None:
    operation = replace(EXAMPLES[-1], sinks=True, quantized=True)  # type: ignore[call-arg]
    assert operation.input_count == 3 + 2 + 3 + 2 + 2 + 1
    dtypes = [*[HALF] * 3, *[INT] * 5, *[HALF] * 2, *[torch.float32] * 2, INT, HALF, INT, INT]
    for position in range(len(dtypes)):
        assert operation.accepts(position, dtypes[: position + 1]), position
    for position in (3, 4, 10, 11, 14, 15):
        assert not operation.accepts(position, [*dtypes[:position], HALF]), position
    assert operation.output_dtypes(dtypes) == [HALF, INT, INT]


def test_cross_attention_writes_nothing() -> None:
    cross = EXAMPLES[3]
    assert not cross.aliases
    assert cross.input_count == 6
    assert len(cross.output_dtypes([HALF] * 3 + [INT] * 3)) == 1


@pytest.mark.parametrize(
    ("position", "dtype", "accepted"),
    [
        (0, torch.float32, True),
        (0, INT, False),
        (3, HALF, True),
        (3, torch.float16, False),
        (5, INT, True),
        (5, torch.int64, False),
        (8, HALF, True),
    ],
)
def test_attention_takes_one_float_type_and_int32_rows(
    position: int, dtype: torch.dtype, accepted: bool
) -> None:
    dtypes = [HALF] * 5 + [INT] * 3 + [HALF] * 3
    assert MERGED.accepts(position, [*dtypes[:position], dtype]) is accepted


def test_linear_shapes_and_types() -> None:
    gated, plain, head = EXAMPLES[4], EXAMPLES[5], EXAMPLES[6]
    assert gated.output_shapes([[1, 5, 576], [3072, 576], [576]]) == [[1, 5, 1536]]
    assert plain.input_count == 4
    assert head.output_dtypes([HALF, HALF, HALF]) == [torch.float32]
    assert head.accepts(3, [HALF, HALF, torch.float32, torch.float32])
    assert head.accepts(2, [HALF, HALF, torch.float32])
    assert not head.accepts(3, [HALF, HALF, HALF, HALF])
    assert not plain.accepts(1, [HALF, torch.float16])


def test_8_bit_weights_are_words_and_have_scales_at_the_end() -> None:
    assert SCALED.input_count == 4
    for dtypes in ([HALF, INT, torch.float32, torch.float32, HALF], [HALF, INT, HALF]):
        for position in range(len(dtypes)):
            assert SCALED.accepts(position, dtypes[: position + 1])
    for refused in ([HALF, HALF], [HALF, torch.int8], [HALF, INT, HALF, HALF]):
        assert not SCALED.accepts(len(refused) - 1, refused)
    # x after its norm, x in 8 bits, its scales; each from a multiple of 256 bytes on
    shapes = [(70, 4096), (512, 1024), (4096,), (512, 32)]
    assert SCALED.workspace(shapes, [HALF, INT, HALF, torch.float32]) == 70 * (8192 + 4096 + 128)
    few = [(64, 4096), *shapes[1:]]
    assert SCALED.workspace(few, [HALF, INT, HALF, torch.float32]) == 0


def test_8_bit_weights_of_experts_are_words_and_have_scales_at_the_end() -> None:
    operation = GroupedLinearOperation(
        inputs=64, outputs=32, experts=4, bias=True, scaled=True, gated=True
    )
    assert operation.input_count == 5
    dtypes = [HALF, INT, INT, HALF, torch.float32, HALF]
    for position in range(len(dtypes)):
        assert operation.accepts(position, dtypes[: position + 1]), position
    for position in (2, 3, 4, 5):
        assert not operation.accepts(position, [*dtypes[:position], torch.float16]), position


def test_layers_of_experts_take_ids_of_both_types() -> None:
    plain, biased = EXAMPLES[7:9]
    assert (plain.input_count, biased.input_count) == (3, 4)
    for x in ([7, 2048], [7, 8, 2048]):
        assert plain.output_shapes([x, [7, 8], [128, 1536, 2048]]) == [[7, 8, 768]]
    assert plain.output_dtypes([HALF, INT, HALF]) == [HALF]
    assert plain.accepts(1, [HALF, INT]) and plain.accepts(1, [HALF, torch.int64])
    assert not plain.accepts(1, [HALF, HALF])
    assert not plain.accepts(2, [HALF, INT, torch.float16])
    assert not plain.accepts(0, [torch.int8])
    shapes, dtypes = [(512, 2048), (512, 8), (128, 1536, 2048)], [HALF, INT, HALF]
    assert plain.workspace(shapes, dtypes) >= 4 * (512 * 8 + 128)
    assert plain.workspace([(64, 2048), (64, 8), (128, 1536, 2048)], dtypes) == 0


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_survive_a_plan(activation: str) -> None:
    layer = LinearOperation(inputs=8, outputs=8, activation=activation)
    assert LinearOperation.from_fields(layer.to_fields()) == layer


def test_update_takes_results_of_earlier_reads() -> None:
    update = UpdateOperation(axis=1, append=True, readers=2)
    assert update.input_count == 6
    assert dict(update.aliases) == {0: 0}
    dtypes = [torch.int8, INT, torch.int8, INT, torch.float32, torch.bool, torch.int8]
    assert all(update.accepts(position, dtypes[: position + 1]) for position in range(7))
    assert not update.accepts(2, [torch.int8, INT, torch.float32])


def test_attention_takes_results_of_earlier_reads() -> None:
    attention = EXAMPLES[14]
    assert attention.input_count == 10
    assert dict(attention.aliases) == {1: 3, 2: 4}
    dtypes = [HALF] * 5 + [INT] * 3 + [torch.float32, torch.bool] + [HALF] * 3
    assert all(attention.accepts(position, dtypes[: position + 1]) for position in range(13))
    assert not attention.accepts(10, [*dtypes[:10], torch.float32])
    assert not attention.accepts(4, [HALF] * 4 + [INT])


def test_scratch_memory_is_for_many_tokens_only() -> None:
    layer = EXAMPLES[4]
    assert layer.workspace([(1, 4, 576), (3072, 576), (576,)], [HALF] * 3) == 0
    assert (
        layer.workspace([(1, 512, 576), (3072, 576), (576,)], [HALF] * 3) >= 512 * (576 + 3072) * 2
    )


RECURRENCES: list[tuple[RecurrentOperation, list[list[int]], int]] = [
    (
        CausalConv1dOperation(bias=True, silu=True),
        [[7, 64], [64, 4], [5, 3, 64], [3], [4], [64]],
        0,
    ),
    (
        SelectiveScanOperation(skip=True),
        [
            *([7, 8, 16], [7, 8], [8, 1, 1], [7, 2, 32], [7, 2, 32]),
            *([5, 8, 16, 32], [3], [4], [8]),
        ],
        0,
    ),
    (
        DeltaRuleOperation(),
        [[7, 4, 16], [7, 4, 16], [7, 4, 24], [7, 4], [7, 4], [5, 4, 16, 24], [3], [4]],
        2,
    ),
    (LinearRecurrenceOperation(), [[7, 64], [7, 64], [5, 64], [3], [4]], 1),
]
"""Operations with their inputs' shapes, and the input whose shape the result has."""


@pytest.mark.parametrize(("operation", "shapes", "values"), RECURRENCES, ids=str)
def test_a_recurrence_aliases_its_state(
    operation: RecurrentOperation, shapes: list[list[int]], values: int
) -> None:
    state = operation.first_state
    assert operation.input_count == len(shapes)
    assert operation.output_shapes(shapes) == [shapes[values], shapes[state]]
    plugin = plugins(load_tensorrt("tensorrt_rtx")).make(operation)
    assert [plugin.get_aliased_input(output) for output in range(2)] == [-1, state]
    dtypes = [HALF] * len(shapes)
    dtypes[state : state + 3] = [torch.float32, INT, INT]
    outputs = operation.output_dtypes(dtypes)
    assert outputs == [HALF, torch.float32]
    every = [*dtypes, *outputs]
    assert all(operation.accepts(position, every[: position + 1]) for position in range(len(every)))
    assert not operation.accepts(state + 1, [*every[: state + 1], torch.int64])
    assert not operation.accepts(state, [*every[:state], INT])
    assert not operation.accepts(len(every) - 1, [*every[:-1], HALF])
    reading = replace(operation, readers=1)
    assert reading.input_count == len(shapes) + 1
    assert reading.accepts(len(shapes), [*dtypes, torch.bool]), "what was read before"


def test_scratch_memory_of_prompts_suffices_for_fewer_rows() -> None:
    """One token for each row needs none; the same tokens in one row do."""
    for operation, shapes, _ in RECURRENCES[1:3]:
        most = [tuple(8 if extent == 7 else extent for extent in shape) for shape in shapes]
        most[operation.first_state + 1] = (8,)
        one = [*most]
        one[operation.first_state + 1] = (1,)
        dtypes = [HALF] * len(shapes)
        assert operation.workspace(most, dtypes) >= operation.workspace(one, dtypes) > 0
        assert operation.workspace(most, [torch.float32] * len(shapes)) == 0, "no chunks"


def test_a_launch_that_fails_is_counted() -> None:
    """TensorRT 10.6 reports success for a step in which a plugin failed; engines compare this."""
    owner = plugins(load_tensorrt("tensorrt_rtx"))
    before = owner.failures
    assert owner.make(MERGED).enqueue([], [], [], [], 0, 0) == 1  # no tensors at all
    assert owner.failures == before + 1
    assert owner.errors[-1].startswith("InplaceAttention: ")
