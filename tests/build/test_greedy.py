"""Sampling is replaced by argmax, for mechanisms that have no kernel for it."""

import pytest
import torch
from inplace.schema.programs import Program
from inplace.schema.specs import SAMPLING_ROLES
from inplace_builder.capture.decoder import SAMPLING_INPUTS
from inplace_builder.fusion.fuse import without_sampling
from support.lowering import captured, greedy_rows
from support.models import accumulator


def test_argmax_replaces_sampling_and_its_inputs() -> None:
    capture = captured("llama")
    greedy, program = without_sampling(capture.exported, capture.program)
    assert Program.model_validate(program.model_dump()) == program
    assert not {spec.role for spec in program.inputs} & set(SAMPLING_INPUTS)
    assert [(spec.name, spec.argmax_of, spec.sampled_from) for spec in program.outputs] == [
        ("next_token", "logits", None),
        ("logits", None, None),
    ]
    targets = [str(node.target) for node in greedy.graph.nodes if node.op == "call_function"]
    assert targets.count("aten.argmax.default") == 1
    assert not [target for target in targets if "sample" in target or "getitem" in target]
    names = {node.name for node in greedy.graph.nodes if node.op == "placeholder"}
    assert {
        node.name for node in capture.exported.graph.nodes if node.op == "placeholder"
    } - names == set(greedy_rows(1))
    assert {spec.arg.name for spec in greedy.graph_signature.input_specs} == names


def test_a_graph_without_sampling_stays_as_it_is() -> None:
    capture = accumulator()
    greedy, program = without_sampling(capture.exported, capture.program)
    assert program == capture.program
    assert str(greedy.graph) == str(capture.exported.graph)


@pytest.mark.parametrize("missing", SAMPLING_ROLES)
def test_a_program_that_samples_has_every_parameter(missing: str) -> None:
    program = captured("gpt2").program
    assert program.vocab_size == program.outputs[1].shape[0]
    fields = program.model_dump()
    fields["inputs"] = [spec for spec in fields["inputs"] if spec["role"] != missing]
    with pytest.raises(
        ValueError,
        match=r"an output that is sampled needs inputs of the roles \['temperature', 'top_k'",
    ):
        Program.model_validate(fields)
    fields = program.model_dump()
    fields["outputs"][0]["sampled_from"] = "missing"
    with pytest.raises(
        ValueError, match="next_token is sampled from 'missing', which is not an output"
    ):
        Program.model_validate(fields)


def test_greedy_rows_have_the_types_of_their_inputs() -> None:
    dtypes = {
        spec.name: spec.dtype.as_torch
        for spec in captured("gpt2").program.inputs
        if spec.role in SAMPLING_INPUTS
    }
    assert {name: tensor.dtype for name, tensor in greedy_rows(2).items()} == dtypes
    assert not any(torch.any(tensor) for tensor in greedy_rows(2).values())
