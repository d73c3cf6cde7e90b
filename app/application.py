"""The ASGI application."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, version

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.middleware.cors import CORSMiddleware

from app import documents, playground, problem
from app.documents import Application
from app.middleware import LimitMiddleware, RequestMiddleware
from app.routes import attack, evaluate, inference, limits, predict, status
from app.service import Service
from app.settings import Settings
from app.shortcut import ShortcutMiddleware


def create_app(settings: Settings | None = None) -> FastAPI:
    """The service as an ASGI application; it loads its model when it starts.

    `app.state.service` is the `Service` behind it. Starting raises CheckpointError for a
    checkpoint that can't be used; this function raises ValueError for a device not there.
    """
    service = Service(settings or Settings())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield

    app = Application(
        title="robust",
        summary="Classify images, attack the classifier, and measure how robust it is.",
        version=_version(),
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.service = service
    problem.install(app)
    documents.install(app)
    playground.install(app)
    routers = [
        module.router(service) for module in (predict, attack, evaluate, status, limits, inference)
    ]
    for router in routers:
        app.include_router(router)
    (prediction,) = routers[0].routes
    assert isinstance(prediction, APIRoute)
    # The last one added is the outermost.
    app.add_middleware(ShortcutMiddleware, route=prediction)
    app.add_middleware(LimitMiddleware, service=service)
    if service.settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.settings.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["*"],
        )
    app.add_middleware(RequestMiddleware, service=service)
    return app


def _version() -> str:
    try:
        return version("robust")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "0"
