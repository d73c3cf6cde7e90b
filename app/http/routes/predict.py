"""POST /predict: classify one or more images."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response
from torch import Tensor

from app.engine.served_model import ServedModel
from app.http.dependencies import service_of
from app.http.images import decode
from app.http.openapi import body
from app.http.parameters import PredictParameters, parse
from app.http.problem import documented
from app.http.schemas import ImagePrediction, PredictResponse
from app.http.uploads import read_upload
from app.http.views import to_prediction
from app.service import unless_gone

# Up to this many probabilities the event loop makes the response itself, in about a millisecond at
# most. 64 images with all of 1,000 classes take over a second.
INLINE = 100

router = APIRouter(tags=["predict"])


@router.post(
    "/predict",
    summary="Classify images",
    response_model=PredictResponse,
    responses=documented(400, 408, 413, 415, 422, 429, 503, 504),
    openapi_extra=body(PredictParameters, files="images"),
)
async def predict(request: Request) -> Response:
    """Return the likeliest classes of each image (JPEG, PNG or WebP).

    Send one or several files in the form field `file`, or one image as the body.
    """
    service = service_of(request)
    upload = await read_upload(request, max_files=service.settings.max_predictions)
    parameters = parse(PredictParameters, upload.parameters)
    model = service.model_for(request)

    async def work() -> str:
        images = await decode(service, request, model, upload.files)
        probabilities = await service.engine.predict(
            model, images, deadline=service.deadline(request)
        )
        arguments = probabilities, model, parameters.top_k
        if probabilities.numel() <= INLINE:
            return _answer(*arguments)
        return await service.run_in_thread(_answer, *arguments)

    return Response(await unless_gone(request, work()), media_type="application/json")


def _answer(probabilities: Tensor, model: ServedModel, top_k: int) -> str:
    results = [
        ImagePrediction(image=index, **dict(to_prediction(row, model.classes, top_k)))
        for index, row in enumerate(probabilities.tolist())
    ]
    return PredictResponse(model_sha256=model.sha256, results=results).model_dump_json()
