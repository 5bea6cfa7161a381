"""The error tree. What the service refuses is an `ApiError`; everything else is our bug.

    ApiError
    ├── InvalidRequest      400  the caller's mistake; `param` names the field
    ├── Unauthenticated     401  no key, or a wrong one
    ├── Forbidden           403  the key may not do this
    ├── NotFound            404  unknown model, route or adapter
    ├── MethodNotAllowed    405
    ├── SlowBody            408  the body did not arrive in time
    ├── Conflict            409  the same change is under way
    ├── TooLarge            413  the body is over the limit
    ├── UnsupportedMedia    415
    ├── RateLimited         429  the key's limit, or a full queue; carries Retry-After
    ├── ServerFailure       500  our bug; the message says nothing of its insides
    │   └── GivenUp         500  workers failed on it; clients are told not to repeat it
    ├── Unavailable         503  no worker is ready, or draining; carries Retry-After
    └── Timeout             504  the request's deadline passed

The wire form is OpenAI's: {"error": {"message", "type", "param", "code"}}.
"""

from __future__ import annotations

import math
from typing import Any


class ApiError(Exception):
    """An answer with status `status` and OpenAI's error body."""

    status = 500
    type = "server_error"
    default_code: str | None = None
    default_retry_after: float | None = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code if code is not None else self.default_code
        self.retry_after = retry_after if retry_after is not None else self.default_retry_after

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Retry-After in whole seconds, rounded up and at least 1, where it is known."""
        if self.retry_after is None:
            return {}
        return {"Retry-After": str(max(1, math.ceil(self.retry_after)))}


class InvalidRequest(ApiError):
    status = 400
    type = "invalid_request_error"


class Unauthenticated(ApiError):
    status = 401
    type = "invalid_request_error"
    default_code = "invalid_api_key"


class Forbidden(ApiError):
    status = 403
    type = "invalid_request_error"
    default_code = "permission_denied"


class NotFound(ApiError):
    status = 404
    type = "invalid_request_error"
    default_code = "not_found"


class MethodNotAllowed(ApiError):
    status = 405
    type = "invalid_request_error"
    default_code = "method_not_allowed"


class SlowBody(ApiError):
    status = 408
    type = "invalid_request_error"
    default_code = "request_timeout"


class Conflict(ApiError):
    status = 409
    type = "invalid_request_error"
    default_code = "conflict"


class TooLarge(ApiError):
    status = 413
    type = "invalid_request_error"
    default_code = "request_too_large"


class UnsupportedMedia(ApiError):
    status = 415
    type = "invalid_request_error"
    default_code = "unsupported_media_type"


class RateLimited(ApiError):
    status = 429
    type = "rate_limit_error"
    default_code = "rate_limit_exceeded"
    default_retry_after = 1.0


class ServerFailure(ApiError):
    status = 500
    type = "server_error"
    default_code = "internal_error"


class GivenUp(ServerFailure):
    default_code = "given_up"

    def headers(self) -> dict[str, str]:
        return {"x-should-retry": "false"}  # OpenAI's clients repeat any other 500


class Unavailable(ApiError):
    status = 503
    type = "server_error"
    default_code = "unavailable"
    default_retry_after = 1.0


class Timeout(ApiError):
    status = 504
    type = "server_error"
    default_code = "timeout"


def model_not_found(model: str) -> NotFound:
    return NotFound(
        f"The model {model!r} does not exist; GET /v1/models lists what is served.",
        param="model",
        code="model_not_found",
    )


def from_wire(
    status: int, message: str, type_: str, code: str | None = None, param: str | None = None
) -> ApiError:
    """The error that a worker's answer describes, class by status."""
    known = {cls.status: cls for cls in ApiError.__subclasses__()}
    error = known.get(status, ServerFailure)(message, param=param, code=code)
    error.type = type_
    return error
