"""POST /evaluate and the jobs it makes: accuracy, clean and under attack, of a labelled set."""

import asyncio
import re
from collections.abc import AsyncIterator
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import HTMLResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent

from app.documents import body
from app.errors import FieldError, InvalidParameters
from app.job import Job
from app.parameters import EvaluateParameters, parse, resolve_attacks
from app.problem import documented
from app.report import check_reportable, make_report
from app.schemas import JobStatus
from app.service import Service, unless_gone
from app.sets import load_set
from app.uploads import read_upload
from app.views import job_status


def router(service: Service) -> APIRouter:
    """The routes on `service`."""
    routes = APIRouter(prefix="/evaluate", tags=["evaluate"])

    async def find(id: str, request: Request) -> Job:
        job = await service.jobs.get(id)
        request.state.model_sha256 = job.model
        return job

    Found = Annotated[Job, Depends(find)]

    @routes.post(
        "",
        summary="Measure accuracy on a labelled set",
        status_code=202,
        responses={
            200: {"model": JobStatus, "description": "Done within the time of `Prefer: wait=N`."},
            **documented(400, 408, 413, 422, 429, 503),
        },
        openapi_extra=body(EvaluateParameters, files="set"),
    )
    async def evaluate(request: Request, response: Response) -> JobStatus:
        """Start an evaluation of an uploaded npz or pt, or of a registered set.

        The answer names the job and its address. With `Prefer: wait=N` it waits up to N seconds
        for the result. The same images and settings sent again are the same job, unless the
        header `Idempotency-Key` says that it is another.
        """
        upload = await read_upload(request, max_files=1)
        parameters = parse(EvaluateParameters, upload.parameters)
        model = service.model_for(request)
        attacks = resolve_attacks(parameters, service.settings)
        # Not among the threads that decode images: predictions would wait behind whole sets.
        async with service.reading_sets:
            dataset = await asyncio.to_thread(
                load_set,
                upload.files,
                parameters.dataset,
                limit=parameters.limit,
                model=model,
                settings=service.settings,
            )
        job = await service.jobs.submit(
            model, dataset, attacks, curve=parameters.curve, key=_idempotency_key(request)
        )
        response.headers["Location"] = str(request.url_for("job", id=job.id).path)
        seconds = _preferred_wait(request, service.settings.deadline_seconds)
        if seconds is not None:
            response.headers["Preference-Applied"] = f"wait={seconds:g}"
            job = await unless_gone(request, service.jobs.ended(job, seconds))
            if not job.active:
                response.status_code = 200
        return job_status(job)

    @routes.get("", summary="Every evaluation", responses=documented(503))
    async def jobs() -> list[JobStatus]:
        """Those queued, running and not yet expired, the newest first."""
        return [job_status(job) for job in await service.jobs.all()]

    @routes.get("/{id}", name="job", summary="An evaluation so far", responses=documented(404, 503))
    async def job(found: Found) -> JobStatus:
        """State, progress and the result so far, with confidence intervals."""
        return job_status(found)

    @routes.get(
        "/{id}/events",
        summary="An evaluation as it goes on",
        response_class=EventSourceResponse,
        responses=documented(404, 503),
    )
    async def events(found: Found) -> AsyncIterator[ServerSentEvent]:
        """Server-sent events: `progress` with the result so far, last `done`, `failed` or
        `cancelled`; each carries what GET /evaluate/{id} answers.
        """
        async for item in service.jobs.watch(found):
            event = "progress" if item.active else item.state
            yield ServerSentEvent(event=event, data=job_status(item))

    @routes.get(
        "/{id}/report",
        summary="The report on an evaluation",
        response_class=HTMLResponse,
        responses={
            200: {
                "description": "One page, or with `Accept: application/pdf` the same as PDF.",
                "content": {"application/pdf": {"schema": {"type": "string", "format": "binary"}}},
            },
            **documented(404, 409, 503),
        },
    )
    async def report(found: Found, request: Request) -> Response:
        """Accuracies, curve, tables by class, costs, flags and what it takes to repeat it.

        Nothing outside it is needed to read it.
        """
        model = service.models.current
        check_reportable(found, model)
        pdf = "application/pdf" in request.headers.get("accept", "").lower()
        return await service.beside(partial(make_report, found, model, pdf=pdf))

    @routes.delete("/{id}", summary="Cancel an evaluation", responses=documented(404, 503))
    async def delete(found: Found) -> JobStatus:
        """Stop it at its next step, keeping what came out so far; forget one that has ended."""
        return job_status(await service.jobs.delete(found.id))

    return routes


def _idempotency_key(request: Request) -> str | None:
    """The client's own name for the job. Raises InvalidParameters."""
    key = request.headers.get("idempotency-key")
    if key is not None and not re.fullmatch(r"[!-~]{1,256}", key):
        expected = "1 to 256 visible ASCII characters"
        raise InvalidParameters(
            [FieldError(field="Idempotency-Key", expected=expected, got="something else")]
        )
    return key


def _preferred_wait(request: Request, most: float) -> float | None:
    """Seconds of ``Prefer: wait=N`` (RFC 7240), at most `most`; None without a valid one."""
    for item in ",".join(request.headers.getlist("prefer")).split(","):
        if match := re.fullmatch(r'\s*wait\s*=\s*"?([0-9]{1,6})"?\s*', item, re.IGNORECASE):
            return min(float(match[1]), most)
    return None
