"""Examples of every response, for the OpenAPI document. A test validates each by its schema."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from app import errors
from app.errors import FieldError
from app.http.open_inference_codec import InferResponse, OutputTensor
from app.http.schemas import (
    AttackResponse,
    AttackResult,
    ClassName,
    ClassProbability,
    Health,
    ImagePrediction,
    JobStatus,
    ModelCard,
    PredictResponse,
    RuntimeChoice,
    Seen,
)
from app.http.views import resolved
from app.jobs.job import JobState
from robust.attacks import AttackSettings, resolve_attack
from robust.classifier import Architecture
from robust.sidecar import Sidecar
from robust.threat_model import ThreatModel

REQUEST_ID = "81f121892aab4b66bb02ca9cc65b1e5b"
_SHA256 = "8a165fb2885b6e4a8c381e1fc9dc6d1a02eacb67a2b09eaa9a46afdce5c84713"
_PNG = "iVBORw0KGgoAAAANSUhEUgAAACAAAAAgCAIAAAD8GO2j"
_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship")
_WHEN = datetime(2026, 11, 22, 13, 20, 44, tzinfo=UTC)
_TOP = [
    ClassProbability(label="horse", index=7, probability=0.8637),
    ClassProbability(label="deer", index=4, probability=0.0371),
]
_SEEN = Seen(label="horse", index=7, probability=0.8637, top=_TOP)

# An exception for each error status, from which the example response is built.
EXAMPLE_ERRORS: dict[int, Exception] = {
    400: errors.BadRequest("The multipart form is malformed, or has too many fields."),
    401: errors.Unauthorized("expected a key in the header Authorization: Bearer KEY"),
    403: errors.Forbidden("Pages of another origin may not do this; see ROBUST_CORS_ORIGINS."),
    404: errors.NotFound("There is no evaluation with this id, or it has expired."),
    408: errors.SlowBody("The body did not arrive in time."),
    409: errors.Conflict("The evaluation is running; there is a report once it is done."),
    413: errors.BodyTooLarge(64 * 2**20),
    415: errors.UnusableImages(
        "unsupported",
        [FieldError(field="file", expected="JPEG, PNG or WebP", got="another format")],
    ),
    422: errors.InvalidParameters(
        [FieldError(field="eps", expected="a size of at least 0, such as 8/255", got="-1")]
    ),
    429: errors.Overloaded("The queue is full.", retry_after=3),
    503: errors.NotReady("The service is loading, shutting down or broken."),
    504: errors.DeadlineExceeded("The work did not finish before its deadline."),
}


def example_responses() -> dict[tuple[str, str, str], Any]:
    """An example of each successful response, by method, path and media type."""
    attacks = [_attack("fgsm"), _attack("pgd")]
    json = "application/json"
    examples: dict[tuple[str, str, str], Any] = {
        ("post", "/predict", json): PredictResponse(
            model_sha256=_SHA256, results=[ImagePrediction(image=0, **_SEEN.model_dump())]
        ),
        ("post", "/attack", json): AttackResponse(
            model_sha256=_SHA256,
            label=ClassName(label="horse", index=7),
            target=None,
            before=_SEEN,
            already_wrong=False,
            input_png=_PNG,
            results=[
                AttackResult(
                    parameters=resolved(attack),
                    after=_SEEN,
                    outcome="withstood",
                    success=False,
                    linf=0.0314,
                    l2=1.687,
                    seconds=0.45,
                    adversarial_png=_PNG,
                    perturbation_png=_PNG,
                )
                for attack in attacks
            ],
        ),
        ("post", "/evaluate", json): _job("queued", attacks),
        ("get", "/evaluate", json): [_job("running", attacks).model_dump(mode="json")],
        ("get", "/evaluate/{id}", json): _job("running", attacks),
        ("delete", "/evaluate/{id}", json): _job("cancelled", attacks),
        ("get", "/evaluate/{id}/events", "text/event-stream"): (
            f"event: progress\ndata: {_job('running', attacks).model_dump_json()}\n\n"
        ),
        ("get", "/evaluate/{id}/report", "text/html"): "<!doctype html>…",
        ("get", "/evaluate/{id}/report", "application/pdf"): "%PDF-1.7…",
        ("get", "/model", json): ModelCard(
            name="robust_model.pt",
            sha256=_SHA256,
            device="cpu",
            loaded=_WHEN,
            classes=list(_CLASSES),
            input_size=32,
            differentiable=True,
            precision="fp32",
            precision_reason="this processor has no instructions for bfloat16",
            search_precision="fp32",
            search_precision_reason="this processor has no instructions for bfloat16",
            runtimes=[RuntimeChoice(images=64, runtime="onnxruntime", images_per_second=965.0)],
            card=Sidecar(
                architecture=Architecture(num_classes=len(_CLASSES)), classes=_CLASSES
            ).to_dict(),
        ),
        ("get", "/livez", json): Health(status="ok"),
        ("get", "/readyz", json): Health(status="ready"),
        ("get", "/metrics", "text/plain"): (
            "# HELP robust_requests_total Requests answered.\n"
            "# TYPE robust_requests_total counter\n"
            'robust_requests_total{method="POST",route="/predict",status="200"} 1.0\n'
        ),
        ("get", "/limits", json): {
            "attacks": [
                {
                    "name": "pgd",
                    "title": "PGD",
                    "summary": "projected gradient descent on the cross-entropy",
                    "takes_steps": True,
                    "takes_target": True,
                    "steps": 20,
                    "unit": "steps",
                    "uses_gradient": True,
                    "cost": 41,
                }
            ],
            "norms": ["linf", "l2"],
            "default_attacks": ["fgsm", "pgd"],
            "default_eps": {"linf": 8 / 255, "l2": 0.5},
            "max_eps": {"linf": 64 / 255, "l2": 10.0},
            "max_cost": 8192,
            "max_steps": 200,
            "max_queries": 5000,
            "max_restarts": 10,
            "max_images": 64,
            "max_upload_images": 10_000,
            "max_body_bytes": 64 * 2**20,
            "max_pixels": 50_000_000,
            "deadline_seconds": 30.0,
            "datasets": ["photos"],
        },
        ("get", "/v2", json): {
            "name": "robust",
            "version": "0.1.0",
            "extensions": ["binary_tensor_data"],
        },
        ("get", "/v2/health/live", json): {"live": True},
        ("get", "/v2/health/ready", json): {"ready": True},
    }
    for version in ("", "/versions/{version}"):
        model = f"/v2/models/robust{version}"
        examples[("get", model, json)] = {
            "name": "robust",
            "versions": [_SHA256],
            "platform": "pytorch_resnet50",
            "inputs": [{"name": "images", "datatype": "FP32", "shape": [-1, 3, 32, 32]}],
            "outputs": [
                {"name": "probabilities", "datatype": "FP32", "shape": [-1, 10]},
                {"name": "index", "datatype": "INT64", "shape": [-1]},
                {"name": "label", "datatype": "BYTES", "shape": [-1]},
            ],
        }
        examples[("get", f"{model}/ready", json)] = {"name": "robust", "ready": True}
        examples[("post", f"{model}/infer", json)] = InferResponse(
            model_version=_SHA256,
            outputs=[OutputTensor(name="label", datatype="BYTES", shape=[1], data=["horse"])],
        ).model_dump(exclude_none=True)
    return {
        key: value if isinstance(value, str | dict | list) else value.model_dump(mode="json")
        for key, value in examples.items()
    }


def _attack(name: str) -> AttackSettings:
    return resolve_attack(name, ThreatModel(norm="linf", eps=8 / 255))


def _job(state: JobState, attacks: list[AttackSettings]) -> JobStatus:
    return JobStatus(
        id="93fdc27234024346add339665a76dc15",
        state=state,
        model_sha256=_SHA256,
        dataset="upload",
        images=5,
        attacks=[resolved(attack) for attack in attacks],
        created=_WHEN,
        finished=_WHEN if state == "cancelled" else None,
    )
