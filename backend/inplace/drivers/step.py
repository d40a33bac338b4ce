"""The step driver: the requests of one call are validated, run and answered inside that call."""

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from inplace.errors import Code, RequestError, failed
from inplace.protocol import MAX_TOKENS
from inplace.runtime.batcher import ActiveRequest
from inplace.runtime.instance import ModelInstance
from inplace.runtime.requests import Request
from inplace.runtime.slots import EndReason

Answer = dict[str, Tensor] | RequestError
"""What a request is answered with: outputs by name, ``[1, ...]``, or why it was refused."""


NO_GENERATION = f"parameter {MAX_TOKENS!r} asks for a generation, this model is served step by step: leave it out, or build with --serve stream"


LONGEST_PAUSE = 3600.0
"""Seconds between two looks at the idle sequences, at most; a thread cannot wait for arbitrarily long."""


log = logging.getLogger("inplace")


def answered(rows: list[ActiveRequest], outputs: Mapping[str, Tensor]) -> list[Answer | None]:
    """What each row of a step is answered with; None where tokens of it are still waiting."""
    parts = {name: tensor.split(1) for name, tensor in outputs.items()}
    return [
        None
        if not work.finished
        else work.error
        or {name: parts[name][row] for name in parts if name in work.requested_outputs}
        for row, work in enumerate(rows)
    ]


class StepDriver:
    """Runs a model instance for a server that calls with batches of requests.

    A thread of its own reclaims idle slots: Triton tells a backend nothing about sequences that went silent.

    Args:
        instance: the model instance; the driver is its only user.
    """

    def __init__(self, instance: ModelInstance) -> None:
        self.instance = instance
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._reclaimer = threading.Thread(
            target=self._reclaim, name="inplace-reclaim", daemon=True
        )
        self._reclaimer.start()

    def run(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer every request, in order; requests of one sequence take effect in the order given."""
        answers: list[Answer | None] = [None] * len(requests)
        waiting = list(enumerate(requests))
        with self._lock, self.instance.engine.on_stream():
            while waiting:
                waiting = self._wave(waiting, answers)
        return [answer for answer in answers if answer is not None]

    def close(self) -> None:
        """Stop the reclaiming thread."""
        self._closing.set()
        self._reclaimer.join()

    def _wave(
        self, waiting: list[tuple[int, Request]], answers: list[Answer | None]
    ) -> list[tuple[int, Request]]:
        """Run the first request of every sequence; returns those that must wait for the next wave.

        A server may hand over the END of one sequence and the START of the next in one call, so a START that finds no free slot
        waits where an END of the same call is about to free one.
        """
        admitted: list[tuple[int, ActiveRequest]] = []
        later: list[tuple[int, Request]] = []
        seen = set()
        for index, request in waiting:
            if request.sequence_id in seen:
                later.append((index, request))
                continue
            seen.add(request.sequence_id)
            try:
                admitted.append((index, self._admit(request)))
            except RequestError as error:
                if error.code is Code.NO_FREE_SLOT and self._will_free(waiting):
                    later.append((index, request))
                else:
                    answers[index] = error
            except Exception as error:  # a defect: nobody else's request must suffer
                log.exception("a request could not be taken")
                answers[index] = failed(error)
        self._steps(admitted, answers)
        return later

    def _admit(self, request: Request) -> ActiveRequest:
        checked = self.instance.validate(request)
        if MAX_TOKENS in request.parameters and checked.refusal is None:
            checked = replace(checked, refusal=RequestError(Code.BAD_PARAMETER, NO_GENERATION))
        return self.instance.admit_validated(checked)

    def _will_free(self, waiting: list[tuple[int, Request]]) -> bool:
        """Whether some request of this call is the END of a live sequence."""
        return any(
            request.end and self.instance.table.get(request.sequence_id) is not None
            for _, request in waiting
        )

    def _steps(
        self, admitted: list[tuple[int, ActiveRequest]], answers: list[Answer | None]
    ) -> None:
        """Step until every admitted request is answered; a prompt longer than the chunk takes several steps."""
        most = self.instance.program.max_rows
        while admitted:
            rows = admitted[:most]
            try:
                self._step(rows, answers)
            except Exception as error:  # a defect, for what the engine raises is an answer
                log.exception("the step driver failed")
                self._drop(rows, answers, failed(error))
                admitted = admitted[most:]
            admitted = [(index, work) for index, work in admitted if not work.finished]

    def _step(self, rows: list[tuple[int, ActiveRequest]], answers: list[Answer | None]) -> None:
        works = [work for _, work in rows]
        for (index, work), answer in zip(
            rows, answered(works, self.instance.step(works)), strict=True
        ):
            if answer is not None:
                answers[index] = answer
                self.instance.finish(work)

    def _drop(
        self,
        rows: list[tuple[int, ActiveRequest]],
        answers: list[Answer | None],
        error: RequestError,
    ) -> None:
        """Answer these rows with an error; their sequences end, for nobody knows where they stand."""
        for index, work in rows:
            answers[index] = error
            if self.instance.table.get(work.sequence.id) is work.sequence:
                self.instance.table.end(work.sequence, EndReason.ENGINE_FAILED)

    def _reclaim(self) -> None:
        while not self._closing.wait(self._pause()):
            with self._lock:
                self.instance.table.reclaim_idle()

    def _pause(self) -> float:
        with self._lock:
            return min(max(0.05, self.instance.table.next_expiry()), LONGEST_PAUSE)
