"""The routes of the Open Inference Protocol, for clients of KServe and Triton."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel, Field
from starlette.requests import ClientDisconnect

from app.engine.served_model import ServedModel
from app.errors import ClientGone, NotFound
from app.http.dependencies import ServiceOf, service_of
from app.http.open_inference_codec import (
    HEADER_LENGTH,
    INPUT,
    MODEL,
    OUTPUTS,
    InferResponse,
    read_request,
    write_response,
)
from app.http.problem import documented
from app.service import unless_gone
from robust.environment import project_version


class ServerLive(BaseModel):
    """Whether the service runs."""

    live: Literal[True] = True


class ServerReady(BaseModel):
    """Whether the service accepts requests."""

    ready: Literal[True] = True


class ServerMetadata(BaseModel):
    """The server's name, version and extensions."""

    name: str = Field(examples=["robust"])
    version: str = Field(examples=["0.1.0"])
    extensions: list[str] = Field(examples=[["binary_tensor_data"]])


class TensorMetadata(BaseModel):
    """An input or output tensor of the model; -1 stands for any size."""

    name: str = Field(examples=["images"])
    datatype: str = Field(examples=["FP32"])
    shape: list[int] = Field(examples=[[-1, 3, 32, 32]])


class ModelMetadata(BaseModel):
    """The model for clients of the protocol."""

    name: Literal["robust"] = "robust"
    versions: list[str] = Field(description="SHA-256 of the served weights.")
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
            "description": "SHA-256 of the weights; 404 once another model is served.",
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


router = APIRouter(prefix="/v2", tags=["open inference protocol"])


def model_of_version(request: Request, service: ServiceOf) -> ServedModel:
    """The served model. Raises NotFound if the path names another version."""
    model = service.model_for(request)
    if request.path_params.get("version", model.sha256) != model.sha256:
        raise NotFound("The served model has another version.")
    return model


ModelOfVersion = Annotated[ServedModel, Depends(model_of_version)]


@router.get("", summary="The server")
async def server() -> ServerMetadata:
    """The server's name, version and extensions of the protocol."""
    return ServerMetadata(name=MODEL, version=project_version(), extensions=["binary_tensor_data"])


@router.get("/health/live", summary="Whether the service runs", responses=documented(503))
async def live(service: ServiceOf) -> ServerLive:
    """The same as /livez."""
    service.engine.check_alive()
    return ServerLive()


@router.get("/health/ready", summary="Whether the service is ready", responses=documented(503))
async def ready(service: ServiceOf) -> ServerReady:
    """The same as /readyz."""
    service.check_ready()
    return ServerReady()


@router.get(
    "/models/robust/versions/{version}",
    summary="A version of the model",
    openapi_extra=_VERSION,
    responses=documented(404, 503),
)
@router.get("/models/robust", summary="The model's tensors", responses=documented(503))
async def metadata(model: ModelOfVersion) -> ModelMetadata:
    """The model's input and output tensors."""
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


@router.get(
    "/models/robust/versions/{version}/ready",
    summary="Whether a version of the model is ready",
    openapi_extra=_VERSION,
    responses=documented(404, 503),
)
@router.get(
    "/models/robust/ready",
    summary="Whether the model is ready",
    responses=documented(503),
)
async def model_ready(_: ModelOfVersion, service: ServiceOf) -> ModelReady:
    """503 while the model is not ready."""
    service.check_ready()
    return ModelReady()


@router.post(
    "/models/robust/versions/{version}/infer",
    summary="Classify tensors with a version of the model",
    response_model=InferResponse,
    responses=documented(400, 404, 408, 413, 415, 429, 503, 504),
    openapi_extra=_BODY | _VERSION,
)
@router.post(
    "/models/robust/infer",
    summary="Classify tensors",
    response_model=InferResponse,
    responses=documented(400, 408, 413, 415, 429, 503, 504),
    openapi_extra=_BODY,
)
async def infer(request: Request, model: ModelOfVersion) -> Response:
    """Probabilities, index and label of each image. Images must have the model's input size.

    FP32 tensors are used as they are; UINT8 tensors are pixels. Input and output tensors may be
    binary data.
    """
    service = service_of(request)
    try:
        body = await request.body()
    except ClientDisconnect:
        raise ClientGone("The client disconnected before its body was complete.") from None

    async def work() -> Response:
        asked = await service.run_in_thread(
            lambda: read_request(
                body,
                request.headers.get(HEADER_LENGTH),
                size=model.input_size,
                limit=service.settings.max_predictions,
            )
        )
        probabilities = await service.engine.predict(
            model, asked.images, deadline=service.deadline(request)
        )
        content, length = await service.run_in_thread(
            lambda: write_response(asked, probabilities, model.classes, version=model.sha256)
        )
        if length is None:
            return Response(content, media_type="application/json")
        headers = {HEADER_LENGTH: str(length)}
        return Response(content, media_type="application/octet-stream", headers=headers)

    return await unless_gone(request, work())
