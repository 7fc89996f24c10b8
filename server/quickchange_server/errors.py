"""Every error that a client can receive, with its HTTP status.

    QuickchangeError
    ├── InvalidRequestError        400  a field is wrong: `param` names it
    │   ├── UnsupportedParameterError 400  a field that this server does not support
    │   └── ContextLengthError     400  prompt and max_tokens exceed the model's context
    ├── UnauthenticatedError       401  no valid API key
    ├── ForbiddenError             403  switched off by a setting, or outside the key's scopes
    ├── UnknownModelError          404  no such base, adapter, version or alias
    ├── NotFoundError              404  no such thing, other than a model
    ├── ConflictError              409  the name is taken or in use
    ├── AdapterFailedError         424  the adapter could not be loaded
    ├── RequestFailedError         424  this request ended the engine repeatedly
    │   └── AdapterWeightsError    400  its adapters' weights give numbers that are not finite
    ├── QueueFullError             429  with Retry-After
    ├── RateLimitedError           429  a limit of the API key; with Retry-After
    ├── EngineFailedError          500  the engine failed inside a request
    ├── WorkerFailedError          500  a process that imports adapters ended
    ├── UnavailableError           503  starting, draining or failed; with Retry-After
    ├── StorageFullError           507  a disk of the server is full
    └── SettingError               500  the server can't start so: `param` names the setting
        └── UnsupportedModelError  500  nor with this base model; the message says why

HTTP frameworks are not known here: `api/` turns these into each surface's error body.
"""

from __future__ import annotations

from typing import ClassVar


class QuickchangeError(Exception):
    """Base class. `message` says what is wrong and what to do; `param` names the field."""

    status: ClassVar[int] = 500
    kind: ClassVar[str] = "server_error"  # OpenAI's error "type"
    code: ClassVar[str | None] = None  # OpenAI's error "code"

    def __init__(
        self, message: str, *, param: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after  # seconds


class InvalidRequestError(QuickchangeError):
    status = 400
    kind = "invalid_request_error"


class UnsupportedParameterError(InvalidRequestError):
    code = "unsupported_parameter"


class ContextLengthError(InvalidRequestError):
    code = "context_length_exceeded"


class UnauthenticatedError(QuickchangeError):
    status = 401
    kind = "authentication_error"
    code = "invalid_api_key"


class ForbiddenError(QuickchangeError):
    status = 403
    kind = "permission_error"


class UnknownModelError(QuickchangeError):
    status = 404
    kind = "invalid_request_error"
    code = "model_not_found"


class NotFoundError(QuickchangeError):
    status = 404
    kind = "invalid_request_error"
    code = "not_found"


class ConflictError(QuickchangeError):
    status = 409
    kind = "invalid_request_error"
    code = "conflict"


class AdapterFailedError(QuickchangeError):
    status = 424
    kind = "adapter_error"
    code = "adapter_failed"


class RequestFailedError(QuickchangeError):
    status = 424
    kind = "request_error"
    code = "request_failed"


class AdapterWeightsError(RequestFailedError):
    """The model's numbers are not finite with these adapters at these weights."""

    status = 400
    kind = "invalid_request_error"
    code = "adapter_weights"


class QueueFullError(QuickchangeError):
    status = 429
    kind = "rate_limit_error"
    code = "queue_full"


class RateLimitedError(QuickchangeError):
    status = 429
    kind = "rate_limit_error"
    code = "rate_limit_exceeded"


class EngineFailedError(QuickchangeError):
    status = 500


class WorkerFailedError(QuickchangeError):
    status = 500


class UnavailableError(QuickchangeError):
    status = 503
    kind = "service_unavailable"
    code = "unavailable"


class StorageFullError(QuickchangeError):
    status = 507
    code = "insufficient_storage"


class SettingError(QuickchangeError):
    """A setting is wrong, so the server does not start; printed on the command line."""

    status = 500


class UnsupportedModelError(SettingError):
    """The model needs a feature that this server lacks; the message names it."""
