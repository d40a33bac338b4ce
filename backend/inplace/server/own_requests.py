"""Requests of a model to itself, which open and close places of sequences in Triton.

They go to the server's gRPC endpoint (`inplace.server.loopback`). Requests between models (BLS)
cannot be used: if one is sent while Triton unloads the model, Triton drops it unanswered and then
crashes (24.10: its threads for BLS end before the stub is told to finalize; what is queued is
destroyed with the instance, after the shared memory that it lies in).
"""

import json
import logging
import secrets
from collections.abc import Callable, Mapping
from typing import Any, Literal

from inplace.drivers.places import (
    END_DELAY,
    STEP_END_DELAY,
    PlaceKeeper,
    Places,
    ServerStoppingError,
)
from inplace.drivers.shutdown import Shutdown, StoppableDriver
from inplace.errors import InplaceError, RequestError
from inplace.runtime.batcher import NULL_SLOT
from inplace.runtime.observer import Observer
from inplace.runtime.slots import EndReason, SequenceId, SequenceState
from inplace.server.loopback import (
    GrpcEndpoint,
    HttpEndpoint,
    LoopbackError,
    ServerOptions,
    ZeroInput,
)
from inplace.server.messages import FLAG_END, FLAG_START
from inplace.server.model_config import TRITON_TYPES
from inplace.server.settings import is_decoupled

Admission = Literal["serve", "acknowledge"]
"""What to do with a request: pass it to the driver, or answer it without outputs."""


NONCE = "inplace_nonce"
"""The parameter that marks our own requests. Its value is random and known only to the instances of
the model."""


NO_ID = (0, "")
"""Correlation ids that name no sequence."""


FORGOTTEN = "must specify the START flag"
"""Triton's error for a request of a sequence that has no place."""


NUMBERS = {name: dtype for dtype, name in TRITON_TYPES.items()}
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
        batching = config["sequence_batching"]
        oldest = batching.get("oldest", {})
        limit = int(oldest.get("max_candidate_sequences", 0))
        delay = int(oldest.get("max_queue_delay_microseconds", 0)) / 1e6
        self._places = Places(
            limit or None,
            end_delay=END_DELAY if is_decoupled(config) else STEP_END_DELAY + delay,
            idle_timeout=int(batching["max_sequence_idle_microseconds"]) / 1e6,
        )
        self._shutdown = Shutdown(driver, server.exit_timeout)
        observer.watch_places(self._places, limit)
        self._keeper: PlaceKeeper | None = None
        try:
            self._own_requests = OwnRequests(
                args, config, self._places, GrpcEndpoint(server), HttpEndpoint(server.http_target)
            )
        except LoopbackError as error:
            log.warning(
                "sequences that end here keep their places in Triton until they have been idle for "
                "max_sequence_idle_microseconds, and the server stops only after that or its exit "
                "timeout: %s",
                error,
            )
            return
        observer.forward_to(self._places)
        self._keeper = PlaceKeeper(self._places, self._own_requests, self._shutdown)

    def admit(self, request: Any) -> Admission | RequestError:
        """What to do with a request; `answered` must be called after the response of one to serve.

        Our own requests are acknowledged, and Triton's warm-up (``model_warmup``): only warm-up
        requests have no correlation id, because Triton refuses a client's without one.
        """
        if self._keeper is not None and self._own_requests.recognize(request):
            return "acknowledge"
        try:
            sequence_id = request.correlation_id()
        except UnicodeDecodeError:  # over HTTP it may be any bytes; the parser refuses it
            flags = request.flags()
            if self._keeper is not None and flags & FLAG_START and not flags & FLAG_END:
                self._places.unnamed_arrived()
            return "serve"
        if sequence_id in NO_ID:
            return "acknowledge"
        if self._keeper is None:
            return "serve"
        flags = request.flags()
        refusal = self._places.arrived(
            sequence_id, start=bool(flags & FLAG_START), end=bool(flags & FLAG_END)
        )
        if refusal is not None:
            self._places.answered(sequence_id)
        return refusal or "serve"

    def answered(self, sequence_id: SequenceId) -> None:
        """A request that was to be served has its final response."""
        if self._keeper is not None and sequence_id not in NO_ID:
            self._places.answered(sequence_id)

    @property
    def nonce(self) -> str:
        """Marks the requests of this instance to the model; empty if it sends none."""
        return self._own_requests.nonce if self._keeper is not None else ""

    def recognize(self, nonce: str) -> None:
        """Take the requests that another instance marks so for its own, not for a client's."""
        if self._keeper is not None and nonce:
            self._own_requests.nonces.add(nonce)

    def watch_starts(self, on_start: Callable[[SequenceId, str], None]) -> None:
        """Call back for STARTs by which other instances open places; Triton may send them here.

        The call has the sequence and the nonce of the instance.
        """
        if self._keeper is not None:
            self._own_requests.on_foreign_start = on_start

    def moved(self, sequence_id: SequenceId) -> None:
        """Another instance has admitted the sequence, whose place is here."""
        if self._keeper is not None:
            self._places.sequence_started(SequenceState(sequence_id, NULL_SLOT))

    def left(self, sequence_id: SequenceId) -> None:
        """The sequence has ended in that instance."""
        if self._keeper is not None:
            self._places.sequence_ended(SequenceState(sequence_id, NULL_SLOT), EndReason.END)

    def close(self) -> None:
        """Stop freeing places; the driver answers everything with SHUTDOWN."""
        if self._keeper is not None:
            self._keeper.close()
            self._own_requests.close()
        self._shutdown.stop_now()


class OwnRequests:
    """Sends START and END to the model of this process, and recognizes them when they arrive.

    Args:
        args: what Triton passes to ``initialize``.
        config: the model configuration.
        places: is notified of the requests that arrive.
        endpoint: sends them.
        http: shows that the server is stopping while requests over HTTP are still answered.

    Attributes:
        nonce: marks the requests of this process.
        nonces: those of all instances of the model, because Triton may send any of them here.
        on_foreign_start: called with the sequence and the nonce of another instance's START.
    """

    def __init__(
        self,
        args: Mapping[str, str],
        config: Mapping[str, Any],
        places: Places,
        endpoint: GrpcEndpoint,
        http: HttpEndpoint,
    ) -> None:
        self._model, self._version = args["model_name"], args["model_version"]
        self._inputs = smallest_inputs(config)
        self.nonce = secrets.token_hex(16)
        self.nonces = {self.nonce}
        self.on_foreign_start: Callable[[SequenceId, str], None] | None = None
        self._places, self._endpoint, self._http = places, endpoint, http

    # Sending

    def end(self, sequence_id: SequenceId) -> bool:
        """Send an END; returns whether Triton knew the sequence.

        Raises:
            LoopbackError: the server cannot be reached.
            OwnRequestError: it refused the request.
        """
        return self._send(sequence_id, end=True)

    def start(self, sequence_id: SequenceId) -> None:
        """Send a START; the same errors."""
        self._send(sequence_id, start=True)

    def check_serving(self) -> None:
        """Raise `ServerStoppingError` if the server is stopping.

        Raises:
            LoopbackError: the server cannot be reached.
        """
        if self._http.is_closing() or self._endpoint.is_exiting():
            raise ServerStoppingError

    def close(self) -> None:
        """Close the connection to the server."""
        self._endpoint.close()

    def _send(self, sequence_id: SequenceId, *, start: bool = False, end: bool = False) -> bool:
        error = self._endpoint.infer(
            self._model,
            self._version,
            self._inputs,
            sequence_id,
            start=start,
            end=end,
            parameters={NONCE: self.nonce},
        )
        if error and FORGOTTEN not in error:
            raise OwnRequestError(error)
        return not error

    # Arriving

    def recognize(self, request: Any) -> bool:
        """Whether a request that has arrived is an instance's own; `places` is notified then."""
        try:
            parameters = request.parameters()
        except UnicodeDecodeError:  # over HTTP they may be any bytes; the parser refuses them
            return False
        if NONCE not in parameters:
            return False
        nonce = next((each for each in self.nonces.copy() if each in parameters), None)
        if nonce is None:
            return False
        flags, sequence_id = request.flags(), request.correlation_id()
        if flags & FLAG_END:
            self._places.own_end_arrived(sequence_id)
        elif flags & FLAG_START:
            self._places.own_start_arrived(sequence_id)
            if nonce != self.nonce and self.on_foreign_start is not None:
                self.on_foreign_start(sequence_id, nonce)
        return True


def smallest_inputs(config: Mapping[str, Any]) -> list[ZeroInput]:
    """Inputs that Triton accepts: the required ones, or the first if all are optional."""
    numbers = [spec for spec in config["input"] if spec["data_type"] in NUMBERS]
    required = [spec for spec in numbers if not spec.get("optional", False)]
    return [
        ZeroInput(
            spec["name"],
            spec["data_type"].removeprefix("TYPE_"),
            (1, *(max(int(extent), 1) for extent in spec["dims"])),
            NUMBERS[spec["data_type"]].as_torch.itemsize,
        )
        for spec in required or numbers[:1]
    ]
