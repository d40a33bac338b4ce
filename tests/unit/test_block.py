"""The inputs of one captured size: what a step brings, then null rows."""

import pytest
import torch
from inplace.engines.tensorrt.block import Block
from inplace.engines.tensorrt.contexts import Size
from inplace.schema.dtypes import Dtype
from inplace.schema.served import Program
from inplace.schema.specs import Role, TensorSpec
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


@pytest.mark.parametrize("before", [False, True])
def test_a_decode_step_is_padded_with_null_rows_of_one_token_each(before: bool) -> None:
    block = Block(PACKED, Size(4, 4), torch.device("cpu"))
    if before:  # nothing of an earlier step is left
        block.fill(step([9, 9, 9, 9], [0, 1, 2, 3, 4], [6, 7, 8, 9], [5, 5, 5, 5]))
    block.fill(step([3, 4], [0, 1, 2], [5, 1], [7, 0]))
    block.upload()
    found = {name: tensor.tolist() for name, tensor in block.tensors.items()}
    assert found == {
        "ids": [3, 4, 0, 0],
        "row_offsets": [0, 1, 2, 3, 4],
        "slots": [5, 1, -1, -1],
        "write_indices": [7, 0, 0, 0],
        "half": [[0.5, 0.5], [0.5, 0.5], [0.0, 0.0], [0.0, 0.0]],
    }


def test_what_a_step_has_from_the_one_before_need_not_be_written_again_and_what_came_between_is() -> (
    None
):
    block = Block(PACKED, Size(4, 4), torch.device("cpu"))
    first = step([3, 4], [0, 1, 2], [5, 1], [7, 0])

    def uploaded() -> dict[str, list[object]]:
        block.upload()
        return {name: tensor.tolist() for name, tensor in block.tensors.items()}

    block.fill(first)
    before = uploaded()
    block.fill({**first, "ids": torch.tensor([8, 9]), "write_indices": first["write_indices"] + 1})
    assert uploaded() == before | {"ids": [8, 9, 0, 0], "write_indices": [8, 1, 0, 0]}
    block.fill(step([1], [0, 1], [2], [9]))
    block.fill(first)
    assert uploaded() == before
    with pytest.raises(RuntimeError, match="size of tensor"):
        block.fill({**first, "ids": torch.tensor([8, 9]), "half": torch.zeros(2, 7)})
    block.fill(first)
    assert uploaded() == before, "a step that could not be filled leaves nothing behind"


def test_the_last_null_row_of_a_mixed_step_owns_the_tokens_that_pad_it() -> None:
    block = Block(PACKED, Size(5, 16), torch.device("cpu"))
    block.fill(step([1, 2, 3, 4, 5], [0, 1, 5], [2, 0], [3, 0]))
    block.upload()
    assert block.tensors["ids"].tolist() == [1, 2, 3, 4, 5] + [0] * 11
    assert block.tensors["row_offsets"].tolist() == [0, 1, 5, 5, 5, 16]
    assert block.tensors["slots"].tolist() == [2, 0, -1, -1, -1]


def test_a_block_that_was_given_nothing_is_padding_throughout() -> None:
    block = Block(PACKED, Size(2, 2), torch.device("cpu"))
    block.upload()
    assert block.tensors["slots"].tolist() == [-1, -1]
    assert block.tensors["row_offsets"].tolist() == [0, 1, 2]
