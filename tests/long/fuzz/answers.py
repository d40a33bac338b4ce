"""How requests are sent, and the judgement of every answer."""

import asyncio
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
from fuzz.wire import Array, Message, outputs
from google.protobuf import text_format
from inplace.errors import Code
from support.models import VOCABULARY
from tritonclient.grpc import service_pb2_grpc

OURS = re.compile(r"INPLACE-(\w+) retryable=[01] sequence=.* request=.*: .{10,}", re.DOTALL)
TRITONS = re.compile(
    r"must specify (the START flag|a non-zero or non-empty correlation ID|batch-size "
    r"1)|Request for unknown model|batch-size must be <="
    r"|Unable to find shared memory region|string correlation ID cannot be longer than 128 "
    r"characters|model version|data-type is"
    r"|expected \d+ inputs|expected number of inputs|already exists in request|byte size "
    r"mismatch|dimensions should be specified"
    r"|has no shape|unexpected (shape|inference input|inference output|explicit tensor "
    r"data)|unable to find data|contents field must not"
    r"|invalid value (type )?for|element count|incorrect length|unexpected number of "
    r"string elements|string (length|element)"
    r"|ModelInfer RPC doesn't support models with decoupled transaction policy|request has "
    r"0 inputs|unexpected 'content' provided"
    r"|incomplete string data for inference input|batch size does not match other inputs"
)
"""Triton's own validation."""
PATIENCE = 30.0
"""Seconds in which every request must have been answered."""

Results = dict[str, Array]


@dataclass
class Findings:
    """What came of the requests.

    Attributes:
        answers: how many of each kind: a code of ours, ``triton``, ``result``, ``cancelled``.
        triton_messages: an example of each of Triton's errors, by text without names.
        wrong: what must not happen, each with what was sent.
    """

    answers: Counter[str] = field(default_factory=Counter)
    triton_messages: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def complain(self, what: str, request: Message, how: list[str]) -> None:
        """Note what must not happen."""
        self.wrong.append(
            f"{what}\n  after {how}: {text_format.MessageToString(request, as_one_line=True)[:800]}"
        )

    def refused(self, text: str, request: Message, how: list[str]) -> str:
        """Judge an error's text, and return it."""
        if (
            (ours := OURS.search(text)) is not None
            and ours[1] in Code.__members__
            and ours[1] != Code.ENGINE_FAILED
        ):
            self.answers[ours[1]] += 1
        elif TRITONS.search(text):
            self.answers["triton"] += 1
            self.triton_messages.setdefault(
                re.sub(r"'.*|[^A-Za-z ]+", " ", text.partition("] ")[2] or text)[:30], text[:160]
            )
        else:
            self.complain(f"neither a result nor a clear error: {text!r}", request, how)
        return text

    def result(self, answer: Results, request: Message, how: list[str]) -> Results:
        """Judge a result, and return it."""
        self.answers["result"] += 1
        for name in ("next_token", "tokens"):
            tokens = answer.get(name, np.zeros((1, 1)))
            if not (
                tokens.ndim == 2
                and len(tokens) == 1
                and set(tokens[0].tolist()) <= set(range(VOCABULARY))
            ):
                self.complain(f"no tokens: {answer}", request, how)
        return answer


class Unary:
    """The server as unary gRPC shows it; for any number of clients."""

    def __init__(self, channel: grpc.aio.Channel, findings: Findings) -> None:
        self._infer = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer
        self.findings = findings

    async def send(
        self, request: Message, how: list[str], cancel_after: float | None = None
    ) -> Results | str:
        """The outputs, or the text of the refusal; ``cancelled`` where it was."""
        call = self._infer(request, timeout=PATIENCE)
        try:
            if cancel_after is not None:
                await asyncio.sleep(cancel_after)
                call.cancel()
            return self.findings.result(outputs(await call), request, how)
        except asyncio.CancelledError:
            self.findings.answers["cancelled"] += 1
            return "cancelled"
        except grpc.aio.AioRpcError as error:
            if (
                error.code() is grpc.StatusCode.CANCELLED
            ):  # Triton cancels all that waits of a sequence with the one that was cancelled
                self.findings.answers["cancelled with its sequence"] += 1
                return "cancelled"
            text = error.details() or ""
            return self.findings.refused(
                text if error.code() is not grpc.StatusCode.INTERNAL else f"INTERNAL {text}",
                request,
                how,
            )
        except (ValueError, KeyError) as error:
            self.findings.complain(f"a result that cannot be read: {error}", request, how)
            return "unreadable"


class Streamed:
    """The server as gRPC streams show it; for one client, that has a stream for each model.

    A stream that carries requests of a decoupled model and of another kind may lose a response, or
    end tritonserver 2.51: docs/failures.md.
    """

    def __init__(self, channel: grpc.aio.Channel, findings: Findings) -> None:
        self._open = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer
        self._calls: dict[str, Any] = {}
        self.findings = findings

    async def send(
        self, request: Message, how: list[str], cancel_after: float | None = None
    ) -> Results | str:
        """All outputs of all responses, or the text of the refusal; ``cancelled`` where it was.

        Opens another stream where it must.
        """
        model = request.model_name
        if model not in self._calls:
            self._calls[model] = self._open()
        call, collected = self._calls[model], list[Message]()
        try:
            await call.write(request)
            if cancel_after is not None:
                await asyncio.sleep(cancel_after)
                call.cancel()
            return await asyncio.wait_for(self._answer(call, collected, request, how), PATIENCE)
        except (asyncio.CancelledError, grpc.aio.AioRpcError, grpc.aio.UsageError) as error:
            del self._calls[model]
            if cancel_after is None:
                self.findings.complain(f"the stream ended: {error!r}", request, how)
            self.findings.answers["cancelled"] += 1
            return "cancelled"
        except asyncio.InvalidStateError:
            del self._calls[model]
            self.findings.complain(
                f"the stream had ended before: {await call.code()} {await call.details()}",
                request,
                how,
            )
            return "unanswered"
        except TimeoutError:
            del self._calls[model]
            self.findings.complain(
                f"no answer in {PATIENCE:.0f} s, {len(collected)} responses before", request, how
            )
            return "unanswered"
        except (ValueError, KeyError) as error:
            self.findings.complain(f"a result that cannot be read: {error}", request, how)
            return "unreadable"

    async def _answer(
        self, call: Any, collected: list[Message], request: Message, how: list[str]
    ) -> Results | str:
        generated: Results = {}
        while True:
            response = await call.read()
            if response is grpc.aio.EOF:
                raise grpc.aio.UsageError("the server closed it")
            collected.append(response)
            if response.error_message:
                return self.findings.refused(response.error_message, request, how)
            if (
                not response.infer_response.outputs
            ):  # Triton cancels all that waits of a sequence with the one that was cancelled
                self.findings.answers["cancelled with its sequence"] += 1
                return "cancelled"
            for name, value in outputs(response.infer_response).items():
                generated[name] = (
                    np.concatenate([generated[name], value], axis=1)
                    if name == "tokens" and name in generated
                    else value
                )
            if response.infer_response.parameters["triton_final_response"].bool_param:
                return self.findings.result(generated, request, how)
