"""Dependencies of route handlers: the service behind the application."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from app.service import Service


def service_of(request: Request) -> Service:
    """The service that handles `request`."""
    service: Service = request.app.state.service
    return service


ServiceOf = Annotated[Service, Depends(service_of)]
