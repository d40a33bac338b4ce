"""A gRPC stream of requests and responses, as a synchronous client uses it."""

import queue

from tritonclient.grpc import InferenceServerClient, InferResult
from tritonclient.utils import InferenceServerException

from inplace.client.calls import Array, InferRequest, outputs_of
from inplace.client.errors import concerns, silent


class Stream:
    """One stream. An error may come without the id of its request, so a stream has one sequence.

    Args:
        connection: without a stream as yet.
        headers: to begin with.
        close: close the connection with the stream.
    """

    def __init__(
        self, connection: InferenceServerClient, headers: dict[str, str], *, close: bool
    ) -> None:
        self._answers: queue.SimpleQueue[
            tuple[InferResult | None, InferenceServerException | None]
        ] = queue.SimpleQueue()
        self._connection, self._close = connection, close
        connection.start_stream(
            lambda result, error: self._answers.put((result, error)), headers=headers
        )

    def send(self, call: InferRequest, model: str) -> None:
        """Put a request on its way.

        Raises:
            tritonclient.utils.InferenceServerException: the stream has broken.
        """
        try:
            self._connection.async_stream_infer(**call.arguments(model))
        except InferenceServerException as error:  # which gives no status
            if "stream" not in (error.message() or "").lower():
                raise  # the request cannot be sent at all
            raise InferenceServerException(error.message(), "StatusCode.UNAVAILABLE") from error

    def receive(self, call: InferRequest, timeout: float) -> dict[str, Array]:
        """The outputs of the next response to a request; those to earlier ones are dropped.

        Raises:
            tritonclient.utils.InferenceServerException: an error came, the stream broke, or nothing came for ``timeout`` seconds.
        """
        while True:
            try:
                result, error = self._answers.get(timeout=timeout)
            except queue.Empty:
                raise silent(timeout) from None
            if error is not None and concerns(error, call.request):
                raise error
            if result is not None and result.get_response().id == call.request:
                return outputs_of(result)

    def close(self, *, cancel: bool) -> None:
        """Close it.

        Args:
            cancel: do not wait for responses that are still to come. tritonclient then leaves a thread behind, so this is for servers
                that do not answer any more.
        """
        self._connection.stop_stream(cancel_requests=cancel)
        if self._close:
            self._connection.close()
