"""Builds all error responses, as application/problem+json (RFC 9457)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from app import errors
from app.errors import FieldError
from app.http.parameters import field_errors
from app.http.paths import route_path
from robust.datasets import DatasetError

MEDIA_TYPE = "application/problem+json"
PROTOCOL = "/v2"  # below it, errors have the Open Inference Protocol's format
RETRY_SECONDS = 5  # for a 503, whose duration is unknown
CLIENT_CLOSED_REQUEST = 499  # nonstandard; appears only in logs, as the client has disconnected


class Fault(BaseModel):
    """One error in the request."""

    field: str = Field(description="The parameter or part of the body.", examples=["eps"])
    expected: str = Field(examples=["a size of at least 0"])
    got: str = Field(examples=["-1"])


class Problem(BaseModel):
    """An error, as RFC 9457 describes it."""

    type: str = Field(examples=["urn:robust:problem:invalid-parameters"])
    title: str = Field(examples=["Invalid parameters"])
    status: int = Field(examples=[422])
    detail: str = Field(examples=["eps: expected a size of at least 0"])
    instance: str = Field(examples=["urn:robust:request:5f1c"])
    request_id: str = Field(examples=["5f1c"])
    errors: list[Fault] = Field(default_factory=list)


class ProblemResponse(Response):
    """An error response with its problem document."""

    media_type = MEDIA_TYPE

    def __init__(self, problem: Problem, headers: Mapping[str, str] | None) -> None:
        super().__init__(problem.model_dump_json(), problem.status, headers)
        self.problem, self.extra_headers = problem, headers


class ProtocolError(BaseModel):
    """An error in the Open Inference Protocol's format."""

    error: str = Field(examples=["data: expected numbers from 0 to 1"])


def problem(
    request_id: str,
    status: int,
    title: str,
    detail: str,
    *,
    faults: Sequence[FieldError] = (),
    headers: Mapping[str, str] | None = None,
) -> ProblemResponse:
    """An error response; its type URN is made from `title`."""
    body = Problem(
        type=f"urn:robust:problem:{title.lower().replace(' ', '-')}",
        title=title,
        status=status,
        detail=detail,
        instance=f"urn:robust:request:{request_id}",
        request_id=request_id,
        errors=[Fault(field=f.field, expected=f.expected, got=f.got) for f in faults],
    )
    return ProblemResponse(body, headers)


def problem_response(request_id: str, error: Exception) -> ProblemResponse:
    """The error response for an exception; 500 without details for an unexpected one."""
    match error:
        case errors.UnusableImages():
            status, title = _IMAGE_STATUS[error.kind]
            return problem(request_id, status, title, str(error), faults=error.errors)
        case errors.InvalidParameters():
            return problem(request_id, 422, "Invalid parameters", str(error), faults=error.errors)
        case errors.Unauthorized():
            headers = {"WWW-Authenticate": 'Bearer realm="robust"'}
            return problem(request_id, 401, "Unauthorized", str(error), headers=headers)
        case errors.Overloaded():
            headers = {"Retry-After": str(error.retry_after)}
            return problem(request_id, 429, "Overloaded", str(error), headers=headers)
        case errors.NotReady() | errors.EngineStopped():
            headers = {"Retry-After": str(RETRY_SECONDS)}
            return problem(request_id, 503, "Not ready", str(error), headers=headers)
        case errors.OutOfMemory():
            headers = {"Retry-After": str(RETRY_SECONDS)}
            return problem(request_id, 503, "Out of memory", str(error), headers=headers)
        case errors.ServiceError():
            status, title = _STATUS[type(error)]
            return problem(request_id, status, title, str(error) or title)
        case DatasetError():
            # `found` may contain names from the uploaded file.
            got = "".join(char if char.isprintable() else "?" for char in error.found[:200])
            fault = FieldError(field="file", expected=error.expected, got=got)
            detail = f"expected {error.expected}"
            return problem(request_id, 422, "Unusable dataset", detail, faults=[fault])
        case RequestValidationError():
            faults = field_errors(error.errors())
            detail = str(errors.InvalidParameters(faults))
            return problem(request_id, 422, "Invalid parameters", detail, faults=faults)
        case HTTPException():
            title = HTTPStatus(error.status_code).phrase.capitalize()
            detail = _DETAILS.get(error.status_code, title)
            return problem(request_id, error.status_code, title, detail, headers=error.headers)
    return problem(request_id, 500, "Internal error", "The service failed; the log says why.")


def error_response(scope: Scope, error: Exception) -> Response:
    """The error response for an exception, in the format of the request's path."""
    response = problem_response(scope["state"]["request_id"], error)
    if not has_protocol_errors(route_path(scope)):
        return response
    body = ProtocolError(error=response.problem.detail).model_dump_json()
    headers = response.extra_headers
    return Response(body, response.status_code, headers, media_type="application/json")


def has_protocol_errors(path: str) -> bool:
    """Whether errors under `path` have the Open Inference Protocol's format."""
    return path == PROTOCOL or path.startswith(f"{PROTOCOL}/")


def install(app: FastAPI) -> None:
    """Handle the expected errors of `app`; the middleware catches the unexpected ones."""

    async def handle(request: Request, error: Exception) -> Response:
        return error_response(request.scope, error)

    for kind in (errors.ServiceError, DatasetError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, handle)


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI `responses` of a route for these statuses; `app.http.openapi` adds bodies."""
    return {status: {"description": HTTPStatus(status).phrase} for status in statuses}


_STATUS: dict[type[errors.ServiceError], tuple[int, str]] = {
    errors.BadRequest: (400, "Bad request"),
    errors.UnknownHost: (400, "Unknown host"),
    errors.Forbidden: (403, "Forbidden"),
    errors.NotFound: (404, "Not found"),
    errors.Conflict: (409, "Conflict"),
    errors.SlowBody: (408, "Request timeout"),
    errors.UnsupportedEncoding: (415, "Unsupported encoding"),
    errors.BodyTooLarge: (413, "Too large"),
    errors.ClientGone: (CLIENT_CLOSED_REQUEST, "Client closed request"),
    errors.Cancelled: (CLIENT_CLOSED_REQUEST, "Client closed request"),
    errors.DeadlineExceeded: (504, "Deadline exceeded"),
}
_IMAGE_STATUS = {
    "empty": (400, "Empty image"),
    "broken": (400, "Broken image"),
    "unsupported": (415, "Unsupported image"),
    "too_large": (413, "Too large"),
    "undecodable": (422, "Unusable image"),
}
_DETAILS = {
    404: "There is nothing at this URL; /docs lists the routes.",
    405: "This URL does not support this method; the Allow header lists those it supports.",
}
