"""The errors of the service. `app.http.problem` turns each into a response."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import click


@dataclass(frozen=True, kw_only=True)
class FieldError:
    """One error in a request: the field, what was expected and what was found, safe to return."""

    field: str
    expected: str
    got: str


class ServeError(click.ClickException):
    """The service can't start; the message says why, in one line."""

    exit_code = 2


class ServiceError(Exception):
    """The base class of the errors below."""


class BadRequest(ServiceError):
    """The request is malformed."""


class InvalidParameters(ServiceError):
    """Invalid parameters or parts of the body."""

    def __init__(self, errors: Sequence[FieldError]) -> None:
        super().__init__("; ".join(f"{item.field}: expected {item.expected}" for item in errors))
        self.errors = tuple(errors)


def invalid(field: str, expected: str, got: str) -> InvalidParameters:
    """InvalidParameters with one error."""
    return InvalidParameters([FieldError(field=field, expected=expected, got=got)])


class UnusableImages(InvalidParameters):
    """Images that can't be used; `kind` is that of the library's ImageError, or "undecodable"."""

    def __init__(self, kind: str, errors: Sequence[FieldError]) -> None:
        super().__init__(errors)
        self.kind = kind


class Unauthorized(ServiceError):
    """A request without a valid key, where one is required."""


class Forbidden(ServiceError):
    """A request with an unsafe method from a web page of another origin."""


class UnknownHost(ServiceError):
    """A request for a host that the service does not accept."""


class UnsupportedEncoding(ServiceError):
    """A body with an unsupported content encoding."""


class BodyTooLarge(ServiceError):
    """A body over the limit, declared or streamed."""

    def __init__(self, limit: int, of: str = "body") -> None:
        super().__init__(f"expected at most {limit} bytes of {of}")


class SlowBody(ServiceError):
    """A body that did not arrive in time."""


class ClientGone(ServiceError):
    """The client disconnected; nobody reads the response."""


class NotFound(ServiceError):
    """There is nothing at this URL."""


class Conflict(ServiceError):
    """The request conflicts with the current state."""


class Overloaded(ServiceError):
    """The service or the client's share of it is full; `retry_after` is in whole seconds."""

    def __init__(self, reason: str, *, retry_after: int) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class NotReady(ServiceError):
    """The service is loading or draining, or can't reach what it needs now; worth a retry."""


class EngineStopped(ServiceError):
    """The thread that owns the device has stopped."""


class OutOfMemory(ServiceError):
    """The device has too little memory for this work, even when it runs alone."""


class DeadlineExceeded(ServiceError):
    """The work did not finish in time."""


class Cancelled(ServiceError):
    """The work was cancelled between two of its steps."""
