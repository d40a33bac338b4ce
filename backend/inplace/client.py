"""Talking to a served model: one `Sequence` is one stream of requests over gRPC."""

import secrets
from collections.abc import Mapping
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

Array = NDArray[np.generic]

NOWHERE = 1 << 62
"""A position that no slot can hold."""


class Sequence:
    """One sequence of a served model. The first step carries START; leaving the ``with`` block frees its slot.

    Args:
        client: a connection to the server.
        model: name of the model.
        id: the correlation id, an integer above 0 or a text; a random one if None.
        timeout: seconds to wait for one answer.

    Attributes:
        length: tokens (or entries) the server has accepted: the cached length of the slot.
    """

    def __init__(self, client: InferenceServerClient, model: str, id: int | str | None = None, timeout: float = 60.0) -> None:
        self.client, self.model, self.timeout = client, model, timeout
        self.id: int | str = id if id is not None else secrets.randbits(63) or 1
        self.length = 0
        self._live = False
        self._last: list[InferInput] = []

    def step(
        self,
        inputs: Mapping[str, Array],
        *,
        end: bool = False,
        parameters: Mapping[str, str | int | bool] | None = None,
        outputs: tuple[str, ...] = (),
        request_id: str = "",
    ) -> dict[str, Array]:
        """Send the sequence's next inputs and wait for what the model says.

        Args:
            inputs: by name, without a batch axis.
            end: this is the sequence's last step.
            parameters: custom parameters, for example ``{"logits": True}``.
            outputs: names of the outputs wanted; all if empty.
            request_id: for error texts and logs.

        Returns:
            The outputs by name, without a batch axis.

        Raises:
            tritonclient.utils.InferenceServerException: the server refused; the sequence is as it was before.
        """
        tensors = []
        for name, array in inputs.items():
            tensor = InferInput(name, [1, *array.shape], np_to_triton_dtype(array.dtype))
            tensor.set_data_from_numpy(array[None])
            tensors.append(tensor)
        start, self._last = not self._live, tensors
        result = self.client.infer(
            self.model,
            tensors,
            outputs=[InferRequestedOutput(name) for name in outputs] or None,
            sequence_id=self.id,
            sequence_start=start,
            sequence_end=end,
            parameters=dict(parameters) if parameters else None,
            request_id=request_id,
            client_timeout=self.timeout,
        )
        self._live = not end
        self.length = (0 if start else self.length) + (next(iter(inputs.values())).shape[0] if inputs else 0)
        return {output.name: result.as_numpy(output.name)[0] for output in result.get_response().outputs}

    def tokens(self, ids: Array | list[int], *, end: bool = False) -> int:
        """Send token ids to a decoder and return the next token it says."""
        answer = self.step({"input_ids": np.asarray(ids, dtype=np.int64)}, end=end, outputs=("next_token",))
        return int(answer["next_token"][0])

    def close(self) -> None:
        """End the sequence: an END for a position that nothing can hold is refused and frees the slot all the same, without a step."""
        if not self._live:
            return
        self._live = False
        nowhere = {"position": NOWHERE}
        try:
            self.client.infer(
                self.model, self._last, sequence_id=self.id, sequence_end=True, parameters=nowhere, client_timeout=self.timeout
            )
        except InferenceServerException:
            return  # refused, or the server is gone: either way nothing is held any more

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
