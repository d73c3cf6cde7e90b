"""POST /evaluate and its jobs: clean and robust accuracy on a labeled set."""

import asyncio
import re
from collections.abc import AsyncIterator
from copy import copy
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import HTMLResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent

from app.engine.served_model import attack_precision
from app.errors import Overloaded, invalid
from app.http.auth import Caller
from app.http.dependencies import ServiceOf, service_of
from app.http.openapi import body
from app.http.parameters import EvaluateParameters, check_model, parse, resolve_attacks
from app.http.problem import documented
from app.http.report import Reports
from app.http.schemas import JobStatus
from app.http.sets import load_set
from app.http.uploads import read_upload
from app.http.views import job_status
from app.jobs.job import Job
from app.service import Service, unless_gone

router = APIRouter(prefix="/evaluate", tags=["evaluate"])


async def find(id: str, request: Request) -> Job:
    """The evaluation with that id, if the caller may see it. Raises NotFound."""
    caller: Caller = request.state.caller
    job = await service_of(request).jobs.get(id, caller.owner)
    _describe(request, job)
    return job


def _describe(request: Request, job: Job) -> None:
    """The model and the precision of the evaluation, for the headers of the response."""
    request.state.model_sha256 = job.model
    request.state.precision = attack_precision(bf16=job.precision == "bf16")


Found = Annotated[Job, Depends(find)]


async def find_to_watch(found: Found, request: Request, service: ServiceOf) -> Job:
    """The evaluation with that id. Raises NotFound; Overloaded if the client watches too many."""
    if not service.shares.may_watch(request.state.caller.client):
        reason = f"You watch {service.shares.client_slots} evaluations, which is your share."
        raise Overloaded(reason, retry_after=1)
    return found


Watched = Annotated[Job, Depends(find_to_watch)]


@router.post(
    "",
    summary="Measure accuracy on a labeled set",
    status_code=202,
    responses={
        200: {"model": JobStatus, "description": "Done within the time of `Prefer: wait=N`."},
        **documented(400, 408, 413, 415, 422, 429, 503, 504),
    },
    openapi_extra=body(EvaluateParameters, files="set"),
)
async def evaluate(request: Request, response: Response) -> JobStatus:
    """Start an evaluation of an uploaded npz or pt file, or of a registered set.

    The response has the job's id and URL. With `Prefer: wait=N` it waits up to N seconds for the
    result, unless the client waits for or watches its share of evaluations already. The same images
    and settings sent again are the same job, unless the header `Idempotency-Key` differs.
    """
    service = service_of(request)
    job = await _submit(request, service)
    _describe(request, job)
    response.headers["Location"] = str(request.url_for("job", id=job.id).path)
    seconds = _preferred_wait(request, service.settings.deadline_seconds)
    client = request.state.caller.client
    if seconds is not None and service.shares.may_watch(client):
        request.state.body.release()  # while it waits for a job, it needs no slot
        response.headers["Preference-Applied"] = f"wait={seconds:g}"
        with service.shares.watching(client):
            job = await unless_gone(request, service.jobs.ended(job, seconds))
        if not job.active:
            response.status_code = 200
    return job_status(job)


async def _submit(request: Request, service: Service) -> Job:
    upload = await read_upload(request, max_files=1)
    parameters = parse(EvaluateParameters, upload.parameters)
    model = service.model_for(request)
    attacks = resolve_attacks(parameters, service.settings)
    check_model(attacks, model, curve=parameters.curve)
    caller: Caller = request.state.caller
    key = _idempotency_key(request)
    reading = load_set(
        service, request, model, files=upload.files, name=parameters.dataset, limit=parameters.limit
    )
    return await service.jobs.submit(
        model,
        await unless_gone(request, reading),
        attacks,
        curve=parameters.curve,
        key=key,
        owner=caller.owner,
    )


@router.get(
    "", summary="List evaluations", response_model=list[JobStatus], responses=documented(503)
)
async def jobs(request: Request, service: ServiceOf) -> Response:
    """The queued, running and finished evaluations, newest first; finished ones expire."""
    found = [copy(job) for job in await service.jobs.all(request.state.caller.owner)]
    # In a thread, one at a time: a thousand results would occupy the event loop for long.
    content = await asyncio.to_thread(lambda: [job_status(job).model_dump_json() for job in found])
    return Response(f"[{','.join(content)}]", media_type="application/json")


@router.get(
    "/{id}", name="job", summary="State and result of an evaluation", responses=documented(404, 503)
)
async def job(found: Found) -> JobStatus:
    """State, progress and the result so far, with confidence intervals."""
    return job_status(found)


@router.get(
    "/{id}/events",
    summary="Progress of an evaluation",
    response_class=EventSourceResponse,
    responses=documented(404, 429, 503),
)
async def events(
    found: Watched, request: Request, service: ServiceOf
) -> AsyncIterator[ServerSentEvent]:
    """Server-sent events: `progress` with the result so far, and finally `done`, `failed` or
    `cancelled`; each has the same data as GET /evaluate/{id}.
    """
    with service.shares.watching(request.state.caller.client):
        async for item in service.jobs.watch(found):
            event = "progress" if item.active else item.state
            yield ServerSentEvent(event=event, data=job_status(item))


@router.get(
    "/{id}/report",
    summary="Report of an evaluation",
    response_class=HTMLResponse,
    responses={
        200: {
            "description": "One page, or with `Accept: application/pdf` the same as PDF.",
            "content": {"application/pdf": {"schema": {"type": "string", "format": "binary"}}},
        },
        **documented(404, 409, 503),
    },
)
async def report(found: Found, request: Request, service: ServiceOf) -> Response:
    """The report as one self-contained page: accuracies, accuracy against eps, per-class tables,
    costs, warnings, and everything needed to repeat the evaluation.
    """
    reports: Reports = request.app.state.reports
    pdf = "application/pdf" in request.headers.get("accept", "").lower()
    return await unless_gone(request, reports.get(found, service.models.current, pdf=pdf))


@router.delete("/{id}", summary="Cancel or delete an evaluation", responses=documented(404, 503))
async def delete(found: Found, service: ServiceOf) -> JobStatus:
    """Cancel a queued or running evaluation and keep its result so far, or delete a finished one
    with its result.
    """
    return job_status(await service.jobs.delete(found.id))


def _idempotency_key(request: Request) -> str | None:
    """The value of the header Idempotency-Key. Raises InvalidParameters."""
    key = request.headers.get("idempotency-key")
    if key is not None and not re.fullmatch(r"[!-~]{1,256}", key):
        expected = "1 to 256 visible ASCII characters"
        raise invalid("Idempotency-Key", expected, "something else")
    return key


def _preferred_wait(request: Request, most: float) -> float | None:
    """Seconds of ``Prefer: wait=N`` (RFC 7240), at most `most`; None without a valid one."""
    for item in ",".join(request.headers.getlist("prefer")).split(","):
        if match := re.fullmatch(r'\s*wait\s*=\s*"?([0-9]{1,6})"?\s*', item, re.IGNORECASE):
            return min(float(match[1]), most)
    return None
