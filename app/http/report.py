"""Renders the report of a finished evaluation, like `robust report`."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from starlette.responses import Response

from app.engine.served_model import ServedModel
from app.errors import Conflict
from app.jobs.job import Job
from robust.checkpoint import Checkpoint
from robust.environment import device_in_words, versions
from robust.report import require_extra

# The page has its styles and plots inline, and no scripts.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'"
CACHE_SIZE = 16  # reports, each of some 100 KB


@dataclass(eq=False)
class _Rendering:
    """A report that is being rendered, and the number of requests that wait for it."""

    future: asyncio.Future[bytes]
    waiting: int = 0


class Reports:
    """Renders reports in one thread, and caches the latest.

    Rendering is pure Python: with the GIL, a second thread would speed up no report, and would
    delay the event loop more.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="report")
        self._rendering: dict[tuple[str, bool], _Rendering] = {}
        self._cache: OrderedDict[tuple[str, bool], bytes] = OrderedDict()

    async def get(self, job: Job, model: ServedModel, *, pdf: bool) -> Response:
        """The report of `job` as HTML or PDF, rendered once for all requests.

        A queued report is dropped once no request waits for it. Raises Conflict if there can be no
        report.
        """
        check_reportable(job, model)
        key = job.id, pdf
        content = self._cache.get(key)
        if content is None:
            content = await self._rendered(key, partial(render_report, job, model, pdf=pdf))
            self._cache[key] = content
            while len(self._cache) > CACHE_SIZE:
                self._cache.popitem(last=False)
        if pdf:
            return Response(content, media_type="application/pdf")
        headers = {"Content-Security-Policy": POLICY}
        return Response(content, media_type="text/html", headers=headers)

    async def _rendered(self, key: tuple[str, bool], render: partial[bytes]) -> bytes:
        rendering = self._rendering.get(key)
        if rendering is None:
            loop = asyncio.get_running_loop()
            future = loop.run_in_executor(self._thread, render)
            rendering = self._rendering[key] = _Rendering(future)
        rendering.waiting += 1
        try:
            return await asyncio.shield(rendering.future)
        finally:
            rendering.waiting -= 1
            if not rendering.waiting and self._rendering.get(key) is rendering:
                del self._rendering[key]
                rendering.future.cancel()

    def close(self) -> None:
        """Drop the queued reports."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def check_reportable(job: Job, model: ServedModel) -> None:
    """Raise Conflict, with the reason, if there can be no report."""
    if job.state != "done":
        raise Conflict(f"The evaluation is {job.state}; there is a report once it is done.")
    if job.model != model.sha256:
        raise Conflict("The report needs the model that was evaluated, and another is served now.")
    try:
        require_extra()
    except ValueError:
        raise Conflict("This service was installed without the extra report.") from None


def render_report(job: Job, model: ServedModel, *, pdf: bool) -> bytes:
    """The report as HTML, or as PDF. Takes seconds."""
    from robust.report.build import build_report
    from robust.report.evaluations import parse_evaluation
    from robust.report.html import render_html
    from robust.report.pdf import render_pdf

    assert job.result is not None
    values = {
        **job.result,
        "weights_sha256": job.model,
        "data": {"name": job.dataset, "count": job.images},
        "classes": list(model.classes),
        "seed": job.attacks[0].seed if job.attacks else 0,
        "device": device_in_words(model.device),
        "versions": versions(),
    }
    measurement = parse_evaluation(
        values, source="POST /evaluate", sidecar=model.sidecar, sha256=model.sha256
    )
    checkpoint = Checkpoint(
        classifier=model.exact(),
        sidecar=model.sidecar,
        sha256=model.sha256,
        path=Path(model.name),
    )
    document = build_report(
        checkpoint,
        measurements=(measurement,),
        made_with={**versions(), "device": device_in_words(model.device)},
    )
    return bytes(render_pdf(document)) if pdf else render_html(document).encode()
