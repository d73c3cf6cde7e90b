"""The model card, the health probes and the metrics."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from app.http.dependencies import ServiceOf
from app.http.problem import documented
from app.http.schemas import CompareCard, Health, ModelCard, RuntimeChoice

_METRICS = CONTENT_TYPE_LATEST.partition(";")[0]


router = APIRouter(tags=["status"])


@router.get("/model", summary="The served model", responses=documented(503))
async def model(request: Request, service: ServiceOf) -> ModelCard:
    """The card of the model, with the SHA-256 of its weights."""
    current = service.model_for(request)
    compare = service.compare_with(current)
    return ModelCard(
        name=current.name,
        sha256=current.sha256,
        device=str(current.device),
        loaded=current.loaded,
        classes=list(current.classes),
        input_size=current.input_size,
        differentiable=current.differentiable,
        precision=current.precision,
        precision_reason=current.precision_reason,
        search_precision=str(current.search),
        search_precision_reason=current.search.reason,
        runtimes=[
            RuntimeChoice(
                images=choice.images,
                runtime=choice.runtime.name,
                images_per_second=choice.rate,
            )
            for choice in (current.plan.choices if current.plan else ())
        ],
        card=current.sidecar.to_dict(),
        guessed=dict(current.guessed),
        notes=list(current.notes),
        compare=None
        if compare is None
        else CompareCard(name=compare.name, sha256=compare.sha256, card=compare.sidecar.to_dict()),
    )


@router.get("/livez", summary="Whether the service runs", responses=documented(503))
async def livez(service: ServiceOf) -> Health:
    """503 if the thread that owns the device has died: restart the service."""
    service.engine.check_alive()
    return Health(status="ok")


@router.get("/readyz", summary="Whether the service is ready", responses=documented(503))
async def readyz(service: ServiceOf) -> Health:
    """503 while the model loads and while the service shuts down."""
    service.check_ready()
    return Health(status="ready")


@router.get(
    "/metrics",
    summary="Metrics for Prometheus",
    response_class=Response,
    responses={200: {"content": {_METRICS: {"schema": {"type": "string"}}}}},
)
async def metrics(service: ServiceOf) -> Response:
    """Metrics in Prometheus text format."""
    return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)
