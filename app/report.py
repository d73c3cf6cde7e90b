"""The report on a finished evaluation, as `robust report` makes it."""

from __future__ import annotations

from pathlib import Path

from starlette.responses import Response

from app.errors import Conflict
from app.job import Job
from app.model import ServedModel
from robust.checkpoint import Checkpoint
from robust.environment import device_in_words, versions
from robust.report import require_extra

# It brings its styles and drawings with it, and runs nothing.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'"


def check_reportable(job: Job, model: ServedModel) -> None:
    """Raise Conflict where there is no report to give, with the reason."""
    if job.state != "done":
        raise Conflict(f"The evaluation is {job.state}; a report is made of one that is done.")
    if job.model != model.sha256:
        raise Conflict("Another model is served by now; the report needs the one that was scored.")
    try:
        require_extra()
    except ValueError:
        raise Conflict("This service was installed without the extra report.") from None


def make_report(job: Job, model: ServedModel, *, pdf: bool) -> Response:
    """The report as HTML, or as PDF. Takes seconds: call it beside the event loop."""
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
    if pdf:
        return Response(render_pdf(document), media_type="application/pdf")
    headers = {"Content-Security-Policy": POLICY}
    return Response(render_html(document), media_type="text/html", headers=headers)
