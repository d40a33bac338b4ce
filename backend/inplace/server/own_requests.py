"""Requests of a model to itself, which open and close places of sequences in Triton.

They go through Triton (BLS) while the server runs. Once it stops, BLS fails with "Server not ready"
while the gRPC endpoint serves live sequences on, so they go there (`inplace.server.loopback`).
"""

import json
import logging
import secrets
from collections.abc import Mapping
from typing import Any, Literal

import triton_python_backend_utils as pb_utils

from inplace.drivers.places import (
    END_DELAY,
    STEP_END_DELAY,
    PlaceKeeper,
    Places,
    ServerStoppingError,
)
from inplace.drivers.shutdown import Shutdown, StoppableDriver
from inplace.errors import InplaceError, RequestError
from inplace.runtime.observer import Observer
from inplace.runtime.slots import SequenceId
from inplace.server.loopback import GrpcEndpoint, ServerOptions, ZeroInput
from inplace.server.messages import FLAG_END, FLAG_START, RecentResponses, output_tensor
from inplace.server.model_config import TRITON_TYPES
from inplace.server.settings import is_decoupled

Admission = Literal["serve", "acknowledge"]
"""What to do with a request: pass it to the driver, or answer it without outputs."""


NONCE = "inplace_nonce"
"""The parameter that marks our own requests. Its value is random and known to this process only."""


NO_ID = (0, "")
"""Correlation ids that name no sequence."""


NOT_READY = "Server not ready"
"""Triton's error for every request of a model while the server stops (24.10)."""


FORGOTTEN = "must specify the START flag"
"""Triton's error for a request of a sequence that has no place."""


NO_VERSION = 2**31
"""A version that no model has. A request for it runs nothing; its error shows whether the server is
stopping."""


TORCH_TYPES = {name: dtype.as_torch for dtype, name in TRITON_TYPES.items()}
"""The types of inputs in config.pbtxt, without texts, which no model requires."""


log = logging.getLogger("inplace")


class OwnRequestError(InplaceError):
    """A request of our own failed; the text is the server's."""


class ModelPlaces:
    """The places of one model instance in Triton: counted as requests arrive, freed when unused.

    Args:
        args: what Triton passes to ``initialize``.
        driver: has the sequences.
        observer: of the driver's instance.
    """

    def __init__(
        self, args: Mapping[str, str], driver: StoppableDriver, observer: Observer
    ) -> None:
        server = ServerOptions.of_parent()
        config = json.loads(args["model_config"])
        oldest = config["sequence_batching"].get("oldest", {})
        limit = int(oldest.get("max_candidate_sequences", 0))
        delay = int(oldest.get("max_queue_delay_microseconds", 0)) / 1e6
        end_delay = END_DELAY if is_decoupled(config) else STEP_END_DELAY + delay
        self._places = Places(limit or None, end_delay=end_delay)
        self._own_requests = OwnRequests(args, config, self._places, server)
        self._shutdown = Shutdown(driver, server.exit_timeout)
        observer.forward_to(self._places)
        observer.watch_places(self._places, limit)
        self._keeper = PlaceKeeper(self._places, self._own_requests, self._shutdown)

    def admit(self, request: Any) -> Admission | RequestError:
        """What to do with a request; `answered` must be called after the response of one to serve.

        Our own requests are acknowledged, and Triton's warm-up (``model_warmup``): only warm-up
        requests have no correlation id, because Triton refuses a client's without one.
        """
        if self._own_requests.recognize(request):
            return "acknowledge"
        try:
            sequence_id = request.correlation_id()
        except UnicodeDecodeError:  # over HTTP it may be any bytes; the parser refuses it
            return "serve"
        if sequence_id in NO_ID:
            return "acknowledge"
        flags = request.flags()
        refusal = self._places.arrived(
            sequence_id, start=bool(flags & FLAG_START), end=bool(flags & FLAG_END)
        )
        if refusal is not None:
            self._places.answered(sequence_id)
        return refusal or "serve"

    def answered(self, sequence_id: SequenceId) -> None:
        """A request that was to be served has its final response."""
        if sequence_id not in NO_ID:
            self._places.answered(sequence_id)

    def close(self) -> None:
        """Stop freeing places; the driver answers everything with SHUTDOWN."""
        self._keeper.close()
        self._own_requests.close()
        self._shutdown.stop_now()


class OwnRequests:
    """Sends START and END to the model of this process, and recognizes them when they arrive.

    Args:
        args: what Triton passes to ``initialize``.
        config: the model configuration.
        places: is notified of the requests that arrive.
        server: how to reach the server over gRPC.
    """

    def __init__(
        self,
        args: Mapping[str, str],
        config: Mapping[str, Any],
        places: Places,
        server: ServerOptions,
    ) -> None:
        self._model, self._version = args["model_name"], int(args["model_version"])
        self._decoupled = is_decoupled(config)
        self._inputs = smallest_inputs(config)
        self._nonce = secrets.token_hex(16)
        self._places, self._server = places, server
        self._responses = RecentResponses()
        self._stopping = False
        self._endpoint: GrpcEndpoint | None = None

    # Sending

    def end(self, sequence_id: SequenceId) -> bool:
        """Send an END; returns whether Triton knew the sequence.

        Raises:
            LoopbackError: the server stops, and its gRPC endpoint cannot be reached.
        """
        return self._send(sequence_id, FLAG_END)

    def start(self, sequence_id: SequenceId) -> None:
        """Send a START."""
        self._send(sequence_id, FLAG_START)

    def check_serving(self) -> None:
        """Raise `ServerStoppingError` if the server is stopping."""
        if not self._stopping:
            request = self._request("", 0, version=NO_VERSION)
            self._raise_if_stopping(self._execute(request))
        if self._stopping:
            raise ServerStoppingError

    def close(self) -> None:
        """Close the connection to the server, if there is one."""
        if self._endpoint is not None:
            self._endpoint.close()

    def _send(self, sequence_id: SequenceId, flags: int) -> bool:
        if not self._stopping:
            try:
                error = self._execute(self._request(sequence_id, flags))
                self._raise_if_stopping(error)
            except ServerStoppingError:
                pass
            else:
                return _was_known(error)
        return self._send_over_grpc(sequence_id, flags)

    def _send_over_grpc(self, sequence_id: SequenceId, flags: int) -> bool:
        if self._endpoint is None:
            self._endpoint = GrpcEndpoint(self._server)
        error = self._endpoint.infer(
            self._model,
            self._inputs,
            sequence_id,
            start=bool(flags & FLAG_START),
            end=bool(flags & FLAG_END),
            parameters={NONCE: self._nonce},
        )
        return _was_known(error)

    def _request(self, sequence_id: SequenceId, flags: int, version: int | None = None) -> Any:
        return pb_utils.InferenceRequest(
            model_name=self._model,
            model_version=self._version if version is None else version,
            correlation_id=sequence_id,
            inputs=[output_tensor(spec.name, spec.tensor) for spec in self._inputs],
            requested_output_names=[],
            flags=flags,
            parameters={NONCE: self._nonce},
        )

    def _execute(self, request: Any) -> str:
        """Send a request and wait for its response; its error, or an empty text."""
        try:
            result = request.exec(decoupled=True) if self._decoupled else request.exec()
            responses = list(result) if self._decoupled else [result]
        except Exception as error:  # the stub raises what Triton refuses at once
            return str(error)
        self._responses.keep(responses)
        errors = [response.error().message() for response in responses if response.has_error()]
        return errors[0] if errors else ""

    def _raise_if_stopping(self, error: str) -> None:
        if NOT_READY in error:
            self._stopping = True
            raise ServerStoppingError

    # Arriving

    def recognize(self, request: Any) -> bool:
        """Whether a request that has arrived is our own; `places` is notified of it then."""
        try:
            if self._nonce not in request.parameters():
                return False
        except UnicodeDecodeError:  # over HTTP they may be any bytes; the parser refuses them
            return False
        flags, sequence_id = request.flags(), request.correlation_id()
        if flags & FLAG_END:
            self._places.own_end_arrived(sequence_id)
        elif flags & FLAG_START:
            self._places.own_start_arrived(sequence_id)
        return True


def _was_known(error: str) -> bool:
    """Whether Triton knew the sequence of our own request, from its error or an empty text.

    Raises:
        OwnRequestError: the request failed for another reason.
    """
    if error and FORGOTTEN not in error:
        raise OwnRequestError(error)
    return not error


def smallest_inputs(config: Mapping[str, Any]) -> list[ZeroInput]:
    """Inputs that Triton accepts: the required ones, or the first if all are optional."""
    numbers = [spec for spec in config["input"] if spec["data_type"] in TORCH_TYPES]
    required = [spec for spec in numbers if not spec.get("optional", False)]
    return [
        ZeroInput(
            spec["name"],
            spec["data_type"].removeprefix("TYPE_"),
            (1, *(max(int(extent), 1) for extent in spec["dims"])),
            TORCH_TYPES[spec["data_type"]],
        )
        for spec in required or numbers[:1]
    ]
