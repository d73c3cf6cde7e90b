"""What is served and how it fares: the model card, the probes and the metrics."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from app.errors import EngineStopped, NotReady
from app.problem import documented
from app.schemas import Health, ModelCard, RuntimeChoice
from app.service import Service

_METRICS = CONTENT_TYPE_LATEST.partition(";")[0]


def router(service: Service) -> APIRouter:
    """The routes on `service`."""
    routes = APIRouter(tags=["status"])

    @routes.get("/model", summary="The model in service", responses=documented(503))
    async def model(request: Request) -> ModelCard:
        """The card of the model, with the SHA-256 of its weights."""
        current = service.model_for(request)
        return ModelCard(
            sha256=current.sha256,
            device=str(current.device),
            loaded=current.loaded,
            classes=list(current.classes),
            input_size=current.input_size,
            runtimes=[
                RuntimeChoice(
                    images=choice.images,
                    runtime=choice.runtime.name,
                    images_per_second=choice.rate,
                )
                for choice in (current.plan.choices if current.plan else ())
            ],
            card=current.sidecar.to_dict(),
        )

    @routes.get("/livez", summary="Whether the service runs", responses=documented(503))
    async def livez() -> Health:
        """503 once the thread that owns the device has died: restart the service."""
        if not service.engine.alive:
            raise EngineStopped("The device thread has stopped.")
        return Health(status="ok")

    @routes.get("/readyz", summary="Whether to send requests", responses=documented(503))
    async def readyz() -> Health:
        """503 while the model loads and while the service shuts down."""
        if not service.ready or service.draining or not service.engine.alive:
            raise NotReady("The service is loading, shutting down or broken.")
        return Health(status="ready")

    @routes.get(
        "/metrics",
        summary="Metrics for Prometheus",
        response_class=Response,
        responses={200: {"content": {_METRICS: {"schema": {"type": "string"}}}}},
    )
    async def metrics() -> Response:
        """In Prometheus' text form."""
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return routes
