"""The report of a finished evaluation, as by `robust report`."""

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

# The page contains its styles and plots, and runs no scripts.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'"
KEPT = 16  # reports, each of some 100 KB


@dataclass(eq=False)
class _Making:
    """A report that is being rendered, and the number of waiting requests."""

    task: asyncio.Future[bytes]
    waiting: int = 0


class Reports:
    """Renders reports in a thread of their own, and caches the latest.

    Rendering is Python: a second thread would make none sooner, and hold up the event loop more.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="report")
        self._making: dict[tuple[str, bool], _Making] = {}
        self._kept: OrderedDict[tuple[str, bool], bytes] = OrderedDict()

    async def get(self, job: Job, model: ServedModel, *, pdf: bool) -> Response:
        """The report of `job` as HTML or PDF, rendered once for all requests.

        A report that no client waits for is not started. Raises Conflict if there is no report.
        """
        check_reportable(job, model)
        key = job.id, pdf
        content = self._kept.get(key)
        if content is None:
            content = await self._made(key, partial(make_report, job, model, pdf=pdf))
            self._kept[key] = content
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        if pdf:
            return Response(content, media_type="application/pdf")
        headers = {"Content-Security-Policy": POLICY}
        return Response(content, media_type="text/html", headers=headers)

    async def _made(self, key: tuple[str, bool], make: partial[bytes]) -> bytes:
        making = self._making.get(key)
        if making is None:
            loop = asyncio.get_running_loop()
            making = self._making[key] = _Making(loop.run_in_executor(self._thread, make))
        making.waiting += 1
        try:
            return await asyncio.shield(making.task)
        finally:
            making.waiting -= 1
            if not making.waiting and self._making.get(key) is making:
                del self._making[key]
                making.task.cancel()

    def close(self) -> None:
        """Start no more reports."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def check_reportable(job: Job, model: ServedModel) -> None:
    """Raise Conflict, with the reason, if there is no report."""
    if job.state != "done":
        raise Conflict(f"The evaluation is {job.state}; a report is made of one that is done.")
    if job.model != model.sha256:
        raise Conflict("Another model is served by now; the report needs the one that was scored.")
    try:
        require_extra()
    except ValueError:
        raise Conflict("This service was installed without the extra report.") from None


def make_report(job: Job, model: ServedModel, *, pdf: bool) -> bytes:
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
