"""The Open Inference Protocol beside our own routes, for clients of KServe and Triton."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field
from starlette.requests import ClientDisconnect

from app.errors import ClientGone, EngineStopped, NotFound, NotReady
from app.model import ServedModel
from app.problem import documented
from app.service import Service, unless_gone
from app.tensors import (
    HEADER_LENGTH,
    INPUT,
    MODEL,
    OUTPUTS,
    InferResponse,
    read_request,
    write_response,
)
from robust.environment import project_version


class ServerLive(BaseModel):
    """Whether the service runs."""

    live: Literal[True] = True


class ServerReady(BaseModel):
    """Whether to send requests."""

    ready: Literal[True] = True


class ServerMetadata(BaseModel):
    """What answers here."""

    name: str = Field(examples=["robust"])
    version: str = Field(examples=["0.1.0"])
    extensions: list[str] = Field(examples=[["binary_tensor_data"]])


class TensorMetadata(BaseModel):
    """A tensor the model takes or gives; -1 stands for any number."""

    name: str = Field(examples=["images"])
    datatype: str = Field(examples=["FP32"])
    shape: list[int] = Field(examples=[[-1, 3, 32, 32]])


class ModelMetadata(BaseModel):
    """The model for clients of the protocol."""

    name: Literal["robust"] = "robust"
    versions: list[str] = Field(description="SHA-256 of the weights in service.")
    platform: str = Field(examples=["pytorch_resnet50"])
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ModelReady(BaseModel):
    """Whether the model is ready."""

    name: Literal["robust"] = "robust"
    ready: Literal[True] = True


_VERSION: dict[str, Any] = {
    "parameters": [
        {
            "name": "version",
            "in": "path",
            "required": True,
            "description": "SHA-256 of the weights; 404 once others are in service.",
            "schema": {"type": "string"},
        }
    ]
}
_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"$ref": "#/components/schemas/InferRequest"},
                "example": {
                    "inputs": [
                        {
                            "name": INPUT,
                            "datatype": "UINT8",
                            "shape": [1, 3, 32, 32],
                            "data": [128] * (3 * 32 * 32),
                        }
                    ],
                    "outputs": [{"name": "label"}],
                },
            }
        },
    }
}


def router(service: Service) -> APIRouter:
    """The routes on `service`."""
    routes = APIRouter(prefix="/v2", tags=["open inference protocol"])

    def served(request: Request) -> ServedModel:
        model = service.model_for(request)
        if request.path_params.get("version", model.sha256) != model.sha256:
            raise NotFound("The model in service is of another version.")
        return model

    def check_ready() -> None:
        if not service.ready or service.draining or not service.engine.alive:
            raise NotReady("The service is loading, shutting down or broken.")

    @routes.get("", summary="The server")
    async def server() -> ServerMetadata:
        """Its name and what it can do beyond the protocol."""
        return ServerMetadata(
            name=MODEL, version=project_version(), extensions=["binary_tensor_data"]
        )

    @routes.get("/health/live", summary="Whether the service runs", responses=documented(503))
    async def live() -> ServerLive:
        """The same as /livez."""
        if not service.engine.alive:
            raise EngineStopped("The device thread has stopped.")
        return ServerLive()

    @routes.get("/health/ready", summary="Whether to send requests", responses=documented(503))
    async def ready() -> ServerReady:
        """The same as /readyz."""
        check_ready()
        return ServerReady()

    @routes.get(
        "/models/robust/versions/{version}",
        summary="A version of the model",
        openapi_extra=_VERSION,
        responses=documented(404, 503),
    )
    @routes.get("/models/robust", summary="The model's tensors", responses=documented(503))
    async def metadata(request: Request) -> ModelMetadata:
        """What it takes and what it gives."""
        model = served(request)
        size, architecture = model.input_size, model.sidecar.architecture
        return ModelMetadata(
            versions=[model.sha256],
            platform=f"pytorch_{architecture.arch}",
            inputs=[TensorMetadata(name=INPUT, datatype="FP32", shape=[-1, 3, size, size])],
            outputs=[
                TensorMetadata(
                    name=name,
                    datatype=datatype,
                    shape=[-1, len(model.classes)] if name == "probabilities" else [-1],
                )
                for name, datatype in OUTPUTS.items()
            ],
        )

    @routes.get(
        "/models/robust/versions/{version}/ready",
        summary="Whether a version of the model is ready",
        openapi_extra=_VERSION,
        responses=documented(404, 503),
    )
    @routes.get(
        "/models/robust/ready",
        summary="Whether the model is ready",
        responses=documented(503),
    )
    async def model_ready(request: Request) -> ModelReady:
        """503 as long as it is not."""
        served(request)
        check_ready()
        return ModelReady()

    @routes.post(
        "/models/robust/versions/{version}/infer",
        summary="Classify tensors with a version of the model",
        response_model=InferResponse,
        responses=documented(400, 404, 408, 413, 429, 503, 504),
        openapi_extra=_BODY | _VERSION,
    )
    @routes.post(
        "/models/robust/infer",
        summary="Classify tensors",
        response_model=InferResponse,
        responses=documented(400, 408, 413, 429, 503, 504),
        openapi_extra=_BODY,
    )
    async def infer(request: Request) -> Response:
        """Probabilities, index and label of each image, at the model's size already.

        FP32 tensors are taken as they are, UINT8 ones as the pixels of an image. Tensors may come
        and go as binary data.
        """
        model = served(request)
        try:
            body = await request.body()
        except ClientDisconnect:
            raise ClientGone("The client hung up before its body was complete.") from None

        async def work() -> Response:
            asked = await service.beside(
                lambda: read_request(
                    body,
                    request.headers.get(HEADER_LENGTH),
                    size=model.input_size,
                    limit=service.settings.max_images,
                )
            )
            probabilities = await service.engine.predict(
                model, asked.images, deadline=service.deadline(request)
            )
            content, length = write_response(
                asked, probabilities, model.classes, version=model.sha256
            )
            if length is None:
                return Response(content, media_type="application/json")
            headers = {HEADER_LENGTH: str(length)}
            return Response(content, media_type="application/octet-stream", headers=headers)

        return await unless_gone(request, work())

    return routes
