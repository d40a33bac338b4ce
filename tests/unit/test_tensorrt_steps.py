"""Steps are padded with null rows to the sizes that CUDA graphs are captured for."""

import pytest
import torch
from inplace.engines.tensorrt.steps import (
    AdjustmentBuffers,
    InputBuffers,
    StepSize,
    decode_sizes,
    mixed_sizes,
    output_shape,
    smallest_fit,
)
from inplace.schema.programs import Program
from inplace.schema.specs import Dtype, Role, TensorSpec
from inplace_builder.capture.decoder import DecoderOptions, decoder_program, prompt_program
from torch import Tensor

CONTROLS = {
    "row_offsets": (Role.ROW_OFFSETS, Dtype.INT32),
    "slots": (Role.SLOTS, Dtype.INT32),
    "write_indices": (Role.WRITE_INDICES, Dtype.INT64),
}
PACKED = Program(
    name="step",
    row_layout="packed",
    inputs=(
        TensorSpec(
            name="ids", role=Role.TOKENS, dtype=Dtype.INT64, shape=(-1,), minimum=0, maximum=9
        ),
        *(
            TensorSpec(name=name, role=role, dtype=dtype)
            for name, (role, dtype) in CONTROLS.items()
        ),
        TensorSpec(name="half", role=Role.ROW, dtype=Dtype.BFLOAT16, shape=(2,)),
    ),
    outputs=(),
    aliases=(),
    max_rows=4,
    chunk=8,
)


def step(
    ids: list[int], offsets: list[int], slots: list[int], indices: list[int]
) -> dict[str, Tensor]:
    return {
        "ids": torch.tensor(ids),
        "row_offsets": torch.tensor(offsets, dtype=torch.int32),
        "slots": torch.tensor(slots, dtype=torch.int32),
        "write_indices": torch.tensor(indices),
        "half": torch.full((len(slots), 2), 0.5, dtype=torch.bfloat16),
    }


def program(max_rows: int, chunk: int, max_tokens: int | None = None) -> Program:
    ids = TensorSpec(name="ids", role=Role.TOKENS, dtype=Dtype.INT64, shape=(-1,))
    return Program(
        name="step",
        row_layout="packed",
        inputs=(ids,),
        outputs=(),
        aliases=(),
        max_rows=max_rows,
        chunk=chunk,
        max_tokens=max_tokens,
    )


@pytest.mark.parametrize(
    ("max_rows", "chunk", "max_tokens"),
    [(1, 1, None), (1, 512, None), (3, 8, 9), (8, 128, 512), (64, 1, None), (64, 512, 512)],
)
def test_every_step_fits_a_captured_size(max_rows: int, chunk: int, max_tokens: int | None) -> None:
    packed = program(max_rows, chunk, max_tokens)
    sizes = decode_sizes(packed) + mixed_sizes(packed)
    assert len(set(sizes)) == len(sizes)
    for rows in range(1, max_rows + 1):
        for tokens in range(rows, min(rows * chunk, packed.token_budget) + 1):
            size = smallest_fit(sizes, StepSize(rows, tokens))
            assert size is not None, (rows, tokens)
            assert size.is_decode == (rows == tokens)
            assert size.rows >= rows
            assert size.tokens >= tokens
            if not size.is_decode:
                assert size.rows > rows, "a null row must own the padding tokens"


def test_a_step_beyond_the_largest_fits_no_size() -> None:
    packed = program(4, 8)
    assert smallest_fit(decode_sizes(packed) + mixed_sizes(packed), StepSize(5, 5)) is None
    assert smallest_fit([StepSize(1, 1)], StepSize(1, 2)) is None


@pytest.mark.parametrize("filled_before", [False, True])
def test_a_decode_step_is_padded_with_null_rows_of_one_token_each(filled_before: bool) -> None:
    buffers = InputBuffers(PACKED, StepSize(4, 4), torch.device("cpu"))
    if filled_before:  # nothing of an earlier step is left
        buffers.fill(step([9, 9, 9, 9], [0, 1, 2, 3, 4], [6, 7, 8, 9], [5, 5, 5, 5]))
    buffers.fill(step([3, 4], [0, 1, 2], [5, 1], [7, 0]))
    buffers.upload()
    assert {name: tensor.tolist() for name, tensor in buffers.tensors.items()} == {
        "ids": [3, 4, 0, 0],
        "row_offsets": [0, 1, 2, 3, 4],
        "slots": [5, 1, -1, -1],
        "write_indices": [7, 0, 0, 0],
        "half": [[0.5, 0.5], [0.5, 0.5], [0.0, 0.0], [0.0, 0.0]],
    }


def test_only_inputs_that_changed_since_the_last_step_are_written() -> None:
    buffers = InputBuffers(PACKED, StepSize(4, 4), torch.device("cpu"))
    first = step([3, 4], [0, 1, 2], [5, 1], [7, 0])

    def uploaded() -> dict[str, list[object]]:
        buffers.upload()
        return {name: tensor.tolist() for name, tensor in buffers.tensors.items()}

    buffers.fill(first)
    before = uploaded()
    buffers.fill(
        {**first, "ids": torch.tensor([8, 9]), "write_indices": first["write_indices"] + 1}
    )
    assert uploaded() == before | {"ids": [8, 9, 0, 0], "write_indices": [8, 1, 0, 0]}
    buffers.fill(step([1], [0, 1], [2], [9]))
    buffers.fill(first)
    assert uploaded() == before
    with pytest.raises(RuntimeError, match="size of tensor"):
        buffers.fill({**first, "ids": torch.tensor([8, 9]), "half": torch.zeros(2, 7)})
    buffers.fill(first)
    assert uploaded() == before, "a step that could not be filled leaves nothing behind"


def test_the_last_null_row_of_a_mixed_step_owns_the_tokens_that_pad_it() -> None:
    buffers = InputBuffers(PACKED, StepSize(5, 16), torch.device("cpu"))
    buffers.fill(step([1, 2, 3, 4, 5], [0, 1, 5], [2, 0], [3, 0]))
    buffers.upload()
    assert buffers.tensors["ids"].tolist() == [1, 2, 3, 4, 5] + [0] * 11
    assert buffers.tensors["row_offsets"].tolist() == [0, 1, 5, 5, 5, 16]
    assert buffers.tensors["slots"].tolist() == [2, 0, -1, -1, -1]


def test_buffers_without_inputs_are_padding_throughout() -> None:
    buffers = InputBuffers(PACKED, StepSize(2, 2), torch.device("cpu"))
    buffers.upload()
    assert buffers.tensors["slots"].tolist() == [-1, -1]
    assert buffers.tensors["row_offsets"].tolist() == [0, 1, 2]


def test_adjustments_are_uploaded_for_rows_that_have_them_and_only_after_a_change() -> None:
    program = decoder_program(99, 99, DecoderOptions(capacity=64, max_rows=4, chunk=8))
    cpu = torch.device("cpu")
    buffers = AdjustmentBuffers(program, 4, cpu)
    names = {"adjusted_tokens", "adjustments", "token_mask"}
    assert buffers.tensors(2).keys() == names
    assert not names & InputBuffers(program, StepSize(2, 2), cpu).tensors.keys()

    def inputs(number: int, value: int) -> dict[str, torch.Tensor]:
        lists = {
            name: torch.full_like(tensor, value) for name, tensor in buffers.tensors(2).items()
        }
        return {"num_adjusted": torch.tensor([0, number], dtype=torch.int32), **lists}

    buffers.upload(inputs(0, 5))
    assert not any(tensor.any() for tensor in buffers.tensors(4).values())
    first = inputs(-3, 7)
    buffers.upload(first)
    for tensor in buffers.tensors(4).values():
        assert bool((tensor[1] == 7).all())
        assert not tensor[[0, 2, 3]].any()
        tensor.zero_()
    buffers.upload(first)
    assert not any(tensor.any() for tensor in buffers.tensors(4).values())
    for number, changed in [(3, names - {"token_mask"}), (-1, {"token_mask"})]:
        buffers.upload(inputs(number, 8))
        tensors = buffers.tensors(2)
        assert {name for name in names if bool((tensors[name][1] == 8).all())} == changed
        for name in changed:
            tensors[name].zero_()


def test_each_fed_token_has_its_entry_in_the_program_with_log_probabilities() -> None:
    step = decoder_program(99, 99, DecoderOptions(capacity=64, max_rows=4, chunk=8))
    program, size = prompt_program(step, 99), StepSize(5, 16)
    shapes = {spec.name: output_shape(spec, size) for spec in program.outputs}
    assert shapes["next_token"] == (5, 1)
    assert shapes["logits"] == (5, 99)
    assert shapes["prompt_ranks"] == shapes["prompt_token_logprobs"] == (16,)
    assert shapes["prompt_top_tokens"] == shapes["prompt_top_logprobs"] == (16, 20)
    buffers = InputBuffers(program, size, torch.device("cpu"))
    assert buffers.tensors["following_tokens"].shape == (16,)
    buffers.fill({"following_tokens": torch.tensor([7, 0, 9], dtype=torch.int32)})
    buffers.upload()
    assert buffers.tensors["following_tokens"].tolist() == [7, 0, 9] + [0] * 13
