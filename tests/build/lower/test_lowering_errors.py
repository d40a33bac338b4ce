"""A graph that cannot be lowered is refused with the reason and the model's own line."""

import importlib.util

import pytest
import torch
from inplace.errors import LoadError
from inplace.operators import read, update
from inplace.schema.specs import AliasKind, Dtype, StateSpec, Update
from inplace.trt import TensorRT, load_tensorrt
from inplace_builder.errors import BuildError
from inplace_builder.graph.program import weights_of
from inplace_builder.lower import (
    choose_mechanisms,
    compile_network,
    converter,
    lower,
    mechanism,
    state_converter,
)
from inplace_builder.lower.compile import Target
from inplace_builder.lower.network import Network
from inplace_builder.lower.registry import find_converter, registered
from support.operator_case import Call
from support.operator_cases import CASES
from support.state_cases import STATE_CASES
from torch import Tensor

aten, inplace = torch.ops.aten, torch.ops.inplace
ORDER: tuple[AliasKind, ...] = ("kv_cache_update",)


@pytest.fixture(scope="module")
def rtx() -> TensorRT:
    return load_tensorrt("tensorrt_rtx")


@pytest.mark.parametrize("capability", ["abc", "9.9", "8", ""])
def test_a_gpu_that_tensorrt_does_not_compile_for_is_refused_with_those_it_does(
    capability: str,
) -> None:
    known = r"TensorRT for RTX 1\.7\S* compiles for .*8\.9, 12\.0"
    with pytest.raises(BuildError, match=f"compute_capability is '{capability}'; {known}"):
        Target.of("tensorrt_rtx", capability)


def _export(
    function: object, *inputs: Tensor, **parts: torch.nn.Parameter
) -> torch.export.ExportedProgram:
    return torch.export.export(Call(function, **parts), inputs)  # type: ignore[arg-type]


def test_an_operator_without_converter_is_named_with_its_line(rtx: TensorRT) -> None:
    class Inverse(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            inverse: Tensor = torch.linalg.inv(x)
            return inverse

    exported = torch.export.export(Inverse(), (torch.eye(3),))
    with pytest.raises(
        BuildError,
        match=r"linalg_inv.* has no converter at .*test_lowering_errors.py.*torch.linalg.inv\(x\)",
    ):
        lower(exported, outputs=["out"], tensorrt=rtx)


@pytest.mark.parametrize(
    ("function", "inputs", "reason"),
    [
        (
            lambda x, mask, new: torch.ops.aten.index_put.default(x, [mask], new),
            (torch.zeros(3), torch.ones(3, dtype=torch.bool), torch.zeros(3)),
            "a mask says where it writes several values",
        ),
        (lambda x: torch.dropout(x, 0.5, True), (torch.zeros(3),), "it drops elements at random"),
        (
            lambda x: torch.nn.functional.max_pool1d(x, 2, dilation=2),
            (torch.ones(1, 2, 9),),
            "its windows are dilated",
        ),
        (
            lambda x: torch.nn.functional.batch_norm(x, x[0], x[0], training=True),
            (torch.zeros(3, 3),),
            r"it changes its running statistics \(training\)",
        ),
        (
            lambda x: list(torch.topk(x, 4000)),
            (torch.zeros(5000),),
            "k is 4000; TensorRT takes a constant from 1 to 3840",
        ),
        (
            torch.nn.functional.conv1d,
            (torch.zeros(1, 2, 9), torch.zeros(3, 2, 3)),
            "its kernel is computed",
        ),
        (
            lambda x: aten.sort.stable(x, stable=True, dim=0)[0],
            (torch.ones(17000, 2),),
            "it sorts 17000 entries; up to 16384 are lowered",
        ),
        (lambda x, y: x & y, (torch.ones(3, dtype=torch.int32),) * 2, "only bool is lowered"),
    ],
)
def test_arguments_without_lowering_are_refused_with_the_reason(
    rtx: TensorRT, function: object, inputs: tuple[Tensor, ...], reason: str
) -> None:
    exported = _export(function, *inputs)
    names = [f"out_{index}" for index in range(len(exported.graph_signature.user_outputs))]
    with pytest.raises(BuildError, match=reason):
        lower(exported, outputs=names, tensorrt=rtx)


def test_a_kernel_behind_many_residuals_is_refused_at_once(rtx: TensorRT) -> None:
    def residuals(x: Tensor, kernel: Tensor) -> Tensor:
        for _ in range(40):
            kernel = kernel + torch.relu(kernel)
        return torch.nn.functional.conv1d(x, kernel)

    exported = _export(residuals, torch.zeros(1, 2, 9), torch.zeros(3, 2, 3))
    with pytest.raises(BuildError, match="its kernel is computed"):
        lower(exported, outputs=["out"], tensorrt=rtx)


def test_what_draws_random_numbers_is_no_parameter(rtx: TensorRT) -> None:
    exported = _export(
        lambda x, w: x + w.abs() + torch.rand_like(w),
        torch.ones(3),
        w=torch.nn.Parameter(torch.ones(3)),
    )
    network = Network(rtx)
    network.parameters |= weights_of(exported)
    nodes = {node.target: node for node in exported.graph.nodes}
    folded = network.parameter(nodes[aten.abs.default])
    assert folded is not None and torch.equal(folded, torch.ones(3))
    assert network.parameter(nodes[aten.rand_like.default]) is None


def test_types_that_tensorrt_lacks_are_refused(rtx: TensorRT) -> None:
    with pytest.raises(
        BuildError, match=r"input xs_0 is torch.float64, which TensorRT does not have"
    ):
        lower(
            _export(lambda x: x + 1, torch.zeros(3, dtype=torch.float64)),
            outputs=["out"],
            tensorrt=rtx,
        )


def test_outputs_and_descriptions_must_agree(rtx: TensorRT) -> None:
    with pytest.raises(
        BuildError, match=r"the graph returns 1 tensors, its description names \['a', 'b'\]"
    ):
        lower(_export(lambda x: x + 1, torch.zeros(3)), outputs=["a", "b"], tensorrt=rtx)


def test_a_profile_must_name_every_input_that_varies(rtx: TensorRT) -> None:
    lowered = lower(CASES[0].exported, outputs=["out"], tensorrt=rtx)
    with pytest.raises(
        BuildError, match=r"a profile has no shapes for the inputs \['xs_0', 'xs_1'\]"
    ):
        compile_network(lowered, [{}])


def test_an_error_has_tensorrts_own_message(rtx: TensorRT) -> None:
    lowered = lower(_export(lambda x: x + 1, torch.zeros(3)), outputs=["out"], tensorrt=rtx)
    lowered.network.unmark_output(lowered.network.get_output(0))
    with pytest.raises(BuildError, match=r"cannot build the network: .*output"):
        compile_network(lowered, [])


def test_one_operator_has_one_converter() -> None:
    with pytest.raises(ValueError, match=r"aten.add.Tensor already has the converter add"):
        converter(aten.add.Tensor)(lambda ctx, *_: None)
    with pytest.raises(
        ValueError,
        match=r"inplace.read.default for states of kind copy already has the converter read",
    ):
        state_converter(inplace.read.default, "copy")(lambda ctx, *_: None)
    with pytest.raises(ValueError, match="mechanism 'copy' already has"):
        mechanism("copy")(lambda uses, tensorrt: pytest.fail("never called"))


def test_a_refused_registration_registers_nothing() -> None:
    with pytest.raises(ValueError, match=r"aten.add.Tensor"):
        converter(aten.linalg_inv_ex.default, aten.add.Tensor)(lambda ctx, *_: None)
    assert find_converter(aten.linalg_inv_ex.default) is None
    assert aten.add.Tensor in registered()


def _memory(dtype: Dtype = Dtype.FLOAT32) -> StateSpec:
    return StateSpec(name="memory", shape=(2, 8, 4), dtype=dtype, update=Update.APPEND, axis=1)


def _graph(step: object, dtype: torch.dtype = torch.float32) -> torch.fx.Graph:
    class Step(torch.nn.Module):
        def forward(
            self,
            value: Tensor,
            slots: Tensor,
            row_offsets: Tensor,
            write_indices: Tensor,
            memory: Tensor,
        ) -> Tensor:
            step(value, slots, row_offsets, write_indices, memory)  # type: ignore[operator]
            return value + 1

    control = torch.zeros(2, dtype=torch.int32)
    inputs = (
        torch.zeros(2, 2, 4, dtype=dtype),
        control,
        torch.arange(3, dtype=torch.int32),
        control,
        torch.zeros(2, 2, 8, 4, dtype=dtype),
    )
    graph: torch.fx.Graph = torch.export.export(Step(), inputs).graph
    return graph


def _twice(
    value: Tensor, slots: Tensor, row_offsets: Tensor, write_indices: Tensor, memory: Tensor
) -> None:
    update(memory, slots, value, row_offsets, write_indices, axis=2)
    update(memory, slots, value, row_offsets, write_indices, axis=2)


def _read_and_append(
    value: Tensor, slots: Tensor, row_offsets: Tensor, write_indices: Tensor, memory: Tensor
) -> None:
    read(memory, slots)
    update(memory, slots, value, row_offsets, write_indices, axis=2)


@pytest.mark.parametrize(
    ("step", "dtype", "reason"),
    [
        (_twice, Dtype.FLOAT32, "is updated 2 times a step"),
        (_read_and_append, Dtype.FLOAT32, "memory is read before its update"),
        (
            lambda v, s, o, w, m: update(m, s, v, o, w, axis=2, ring=True),
            Dtype.FLOAT32,
            "memory is a ring",
        ),
        (
            lambda v, s, o, w, m: update(m, s, v, o, w, axis=2),
            Dtype.INT32,
            "memory is int32; the layer takes float32",
        ),
        (
            lambda v, s, o, w, m: update(m, s, torch.ones(2, 2, 8, 4)),
            Dtype.FLOAT32,
            "memory is rewritten; the layer only appends",
        ),
    ],
)
def test_the_cache_layer_refuses_what_it_cannot_do(
    rtx: TensorRT, step: object, dtype: Dtype, reason: str
) -> None:
    graph = _graph(step, dtype.as_torch)
    with pytest.raises(
        BuildError,
        match=f"no mechanism can update memory with TensorRT for RTX .*kv_cache_update: .*{reason}",
    ):
        choose_mechanisms(graph, [_memory(dtype)], rtx, order=ORDER)


def test_the_choice_records_every_refusal(rtx: TensorRT) -> None:
    ring = next(case for case in STATE_CASES if case.name == "ring")
    records = choose_mechanisms(
        ring.exported.graph, ring.states, rtx, order=("kv_cache_update", "copy")
    )
    assert [(record.state, record.kind) for record in records] == [
        ("keys", "copy"),
        ("values", "copy"),
    ]
    assert all("second buffer" in record.reason for record in records)
    assert all(
        refusal.startswith("kv_cache_update: keys is a ring")
        for record in records
        for refusal in record.refused
    )


def test_an_unused_state_is_refused(rtx: TensorRT) -> None:
    with pytest.raises(BuildError, match=r"never uses the states \['memory'\]"):
        choose_mechanisms(CASES[0].exported.graph, [_memory()], rtx, order=("copy",))


def test_states_of_one_operator_have_one_kind(rtx: TensorRT) -> None:
    case = STATE_CASES[0]
    with pytest.raises(
        BuildError, match=r"takes states of different kinds \(keys: copy, values: kv_cache_update\)"
    ):
        lower(
            case.exported,
            outputs=["out"],
            states=case.states,
            kinds={"keys": "copy", "values": "kv_cache_update"},
            tensorrt=rtx,
        )


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed here"
)
def test_a_tensorrt_that_is_not_installed_is_an_error() -> None:
    with pytest.raises(
        LoadError, match=r"TensorRT cannot be imported \(import tensorrt: .*install tensorrt"
    ):
        load_tensorrt("tensorrt")
