"""What can go wrong in the service. `app.problem` turns each into an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class FieldError:
    """One thing wrong with a request: which field, what was expected, what came, in safe words."""

    field: str
    expected: str
    got: str


class ServiceError(Exception):
    """The root of the errors below."""


class BadRequest(ServiceError):
    """A request that can't be read at all."""


class InvalidParameters(ServiceError):
    """Parameters, or parts of the body, that make no sense."""

    def __init__(self, errors: Sequence[FieldError]) -> None:
        super().__init__("; ".join(f"{item.field}: expected {item.expected}" for item in errors))
        self.errors = tuple(errors)


class UnusableImages(InvalidParameters):
    """Images that can't be used; `kind` is that of the library's ImageError."""

    def __init__(self, kind: str, errors: Sequence[FieldError]) -> None:
        super().__init__(errors)
        self.kind = kind


class Unauthorized(ServiceError):
    """A request without a key, or with a wrong one, where one is needed."""


class BodyTooLarge(ServiceError):
    """A body over the limit, declared or streamed."""

    def __init__(self, limit: int, of: str = "body") -> None:
        super().__init__(f"expected at most {limit} bytes of {of}")


class SlowBody(ServiceError):
    """A body that did not arrive in time."""


class ClientGone(ServiceError):
    """The client hung up; nobody reads the answer."""


class NotFound(ServiceError):
    """No such thing under this address."""


class Conflict(ServiceError):
    """What is asked for can't be had as things stand."""


class Overloaded(ServiceError):
    """More work than the service holds; `retry_after` is in whole seconds."""

    def __init__(self, reason: str, *, retry_after: int) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class NotReady(ServiceError):
    """The service is loading or draining."""


class EngineStopped(ServiceError):
    """The thread that owns the device has stopped."""


class OutOfMemory(ServiceError):
    """The device has no memory left for this work, even alone."""


class DeadlineExceeded(ServiceError):
    """The work did not finish in time."""


class Cancelled(ServiceError):
    """The work was given up between two of its steps."""
