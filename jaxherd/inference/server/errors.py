"""What a client is told when something is wrong: a status and OpenAI's error body."""

from collections.abc import Mapping
from typing import Any

BAD_REQUEST = "invalid_request_error"
OVERLOADED = "overloaded_error"


class ApiError(Exception):
    """An answer that is an error.

    Attributes:
      status: of HTTP.
      message: one sentence for the caller.
      kind: the body's `type`.
      param: the field at fault, or None.
      code: a word that programs compare, or None.
      headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = BAD_REQUEST,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind
        self.param, self.code, self.headers = param, code, dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Return the body, as OpenAI's clients read it."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Return the error for a request that says something wrong (400)."""
    return ApiError(400, message, param=param, code=code)


def unauthorized() -> ApiError:
    """Return the error for an absent or wrong API key (401)."""
    return ApiError(
        401,
        "this server needs an API key: send the header 'Authorization: Bearer KEY'.",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def no_model(name: str, served: str) -> ApiError:
    """Return the error for a model that is not served here (404)."""
    return ApiError(
        404,
        f"there is no model {name!r} here: this server has {served!r}.",
        param="model",
        code="model_not_found",
    )


def too_large(limit: int) -> ApiError:
    """Return the error for a body of more than `limit` bytes (413); the connection ends."""
    return ApiError(
        413,
        f"the body is larger than the {limit} bytes that this server takes.",
        code="body_too_large",
        headers={"Connection": "close"},
    )


def queue_full(retry_after: int) -> ApiError:
    """Return the error while as many requests wait as may (429)."""
    return ApiError(
        429,
        f"too many requests are waiting: try again in {retry_after} s.",
        kind=OVERLOADED,
        code="queue_full",
        headers={"Retry-After": str(retry_after)},
    )


def timed_out(seconds: float, retry_after: int) -> ApiError:
    """Return the error for a request that took longer than it may (503)."""
    return ApiError(
        503,
        f"the answer was not ready within {seconds:g} s: ask for fewer tokens, or later.",
        kind=OVERLOADED,
        code="request_timeout",
        headers={"Retry-After": str(retry_after)},
    )


def stopping(retry_after: int) -> ApiError:
    """Return the error of a server that is shutting down (503); the connection ends."""
    return ApiError(
        503,
        "the server is shutting down.",
        kind=OVERLOADED,
        code="shutting_down",
        headers={"Retry-After": str(retry_after), "Connection": "close"},
    )


def broken() -> ApiError:
    """Return the error for a fault of the server (500), which its log explains."""
    return ApiError(
        500, "the server met an error of its own; its log has more.", kind="server_error"
    )
