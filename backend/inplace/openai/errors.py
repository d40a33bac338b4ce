"""Errors as OpenAI's clients read them: a status and a JSON body."""

from typing import Any

from pydantic import ValidationError

from inplace.client.errors import ClientError, UnreachableError
from inplace.errors import Code, InplaceError

RETRY_AFTER = 1
"""Seconds that a client is asked to wait where a server is full, in the header ``Retry-After``."""

_FULL = (Code.NO_FREE_SLOT, Code.QUEUE_FULL)

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    421: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}


class ApiError(InplaceError):
    """A request that is answered with an error.

    Args:
        status: of HTTP.
        message: what was wrong, what was expected, what to do.
        param: the field of the request.
        code: OpenAI's or our own word for it.
        retry_after: seconds after which the same request may succeed.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The body of the answer."""
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, "invalid_request_error"),
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def headers(self) -> dict[str, str]:
        """The headers of the answer, beside its type and length."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {} if self.retry_after is None else {"Retry-After": f"{self.retry_after:.0f}"}


def of_client(error: ClientError) -> ApiError:
    """The answer to a request that the server refused, or did not answer."""
    if error.code == Code.CAPACITY:
        return ApiError(400, error.reason, code="context_length_exceeded")
    if error.code in _FULL:
        return ApiError(
            503,
            "every place of the server is taken; send the request again later",
            code="server_full",
            retry_after=RETRY_AFTER,
        )
    if isinstance(error, UnreachableError):
        return ApiError(
            503, "the server does not answer", code="server_gone", retry_after=RETRY_AFTER
        )
    if "unknown model" in error.reason:
        return ApiError(404, error.reason, param="model", code="model_not_found")
    if error.code == Code.ENGINE_FAILED or error.code not in set(Code):
        return ApiError(500, f"the server failed: {error.reason}", code="server_failed")
    return ApiError(400, error.reason, code=str(error.code).lower())


def invalid_value(message: str, param: str | None = None) -> ApiError:
    """The answer to a request with a value that is not allowed."""
    return ApiError(400, message, param=param, code="invalid_value")


def of_validation(error: ValidationError) -> ApiError:
    """The answer to a body that is not a request."""
    first = error.errors(include_url=False, include_context=False)[0]
    path = ".".join(str(part) for part in first["loc"]) or None
    where, code = "the body" if path is None else f"the field {path!r}", "invalid_value"
    message = f"{where}: {first['msg']}"
    if first["type"] == "extra_forbidden":
        code = "unknown_parameter"
        message = f"{where} is not one that this server knows; docs/openai.md lists those"
    elif first["type"] == "none_required":
        code, message = "unsupported_parameter", f"{where} is not supported here: leave it out"
    return ApiError(400, message, param=path, code=code)
