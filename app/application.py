"""The ASGI application."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.middleware.cors import CORSMiddleware

from app import playground
from app.http import openapi, problem
from app.http.fast_path import FastPathMiddleware
from app.http.middleware import LimitMiddleware, RequestMiddleware
from app.http.openapi import Application
from app.http.report import Reports
from app.http.routes import attack, evaluate, inference, limits, predict, status
from app.http.trust import ProxyMiddleware
from app.service import Service
from app.settings import Settings
from robust.environment import project_version


def create_app(settings: Settings | None = None) -> FastAPI:
    """The service as an ASGI application, which loads its model at startup.

    `app.state.service` is its `Service`. Startup raises CheckpointError for an unusable checkpoint;
    this function raises ValueError for a missing device.
    """
    service = Service(settings or Settings())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            try:
                yield
            finally:
                app.state.reports.close()

    app = Application(
        title="robust",
        summary="Classify images, attack the classifier, and measure how robust it is.",
        version=project_version(),
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        telemetry={"tracing": False, "metrics": False, "logs": False},  # the service has its own
    )
    app.state.service = service
    app.state.reports = Reports()
    problem.install(app)
    openapi.install(app)
    playground.install(app)
    for routes in (predict, attack, evaluate, status, limits, inference):
        app.include_router(routes.router)
    (prediction,) = predict.router.routes
    assert isinstance(prediction, APIRoute)
    # The middleware added last is the outermost.
    app.add_middleware(FastPathMiddleware, route=prediction)
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
    app.add_middleware(
        ProxyMiddleware,
        trusted=service.settings.trusted_proxies,
        root_path=service.settings.root_path,
    )
    return app
