"""A client of the service that does not import torch."""

from __future__ import annotations

import base64
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx

Source = bytes | str | Path
"""An image or a set: its bytes, or the path of a file."""

MAX_SLEEP = 30.0  # seconds before a retry, even if the service asks for more
MAX_WAIT = 999_999  # seconds of `Prefer: wait` that the service reads
_RETRYABLE = (429, 503)  # statuses


class ServiceError(Exception):
    """An error response, one that is not JSON, or no response at all (`status` 0).

    `errors` lists each invalid field with what was expected and what was found.
    """

    def __init__(self, status: int, problem: Mapping[str, Any], retry_after: float | None) -> None:
        self.status, self.retry_after = status, retry_after
        self.title = str(problem.get("title", "No answer"))
        self.detail = str(problem.get("detail", ""))
        self.request_id = str(problem.get("request_id", ""))
        self.errors: Sequence[Mapping[str, str]] = problem.get("errors", [])
        super().__init__(f"{status} {self.title}: {self.detail} (request {self.request_id})")


@dataclass(frozen=True, kw_only=True)
class Class:
    """A class with its probability in [0, 1]."""

    label: str
    index: int
    probability: float


@dataclass(frozen=True, kw_only=True)
class Prediction(Class):
    """The prediction for an image; `top` has the likeliest classes, this one first."""

    top: tuple[Class, ...]


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """The result of the other model on an adversarial image."""

    after: Prediction
    outcome: str  # like `Attack.outcome`


@dataclass(frozen=True, kw_only=True)
class Attack:
    """One attack on one image; everything is measured on `image`, a PNG.

    With `compare` there is also the same attack on the comparison model, and each has the other
    model's result on its `image` as `transfer`.
    """

    name: str
    parameters: Mapping[str, Any]  # with all defaults
    before: Prediction
    after: Prediction
    outcome: str  # broken, withstood, or already_wrong if the original was misclassified
    success: bool  # whether `outcome` is broken
    linf: float  # distances in pixel units
    l2: float
    seconds: float
    image: bytes
    perturbation: bytes  # PNG of what was added, amplified
    transfer: Transfer | None = None
    compare: Attack | None = None


@dataclass(frozen=True, kw_only=True)
class Job:
    """An evaluation job; `evaluation` is the result so far, as in the OpenAPI document."""

    id: str
    state: str  # queued, running, done, failed or cancelled
    model_sha256: str
    images: int
    evaluation: Mapping[str, Any] | None
    error: str | None

    @property
    def active(self) -> bool:
        """Whether it is queued or running."""
        return self.state in ("queued", "running")


class Client:
    """A client of the service at an address. Close it, or use it in a `with` statement.

    `key` is one of the service's API keys, if it has any. Requests refused because the service is
    full or not ready are retried up to `retries` times, after `Retry-After`; `watch` also retries
    if its connection ends before the evaluation. Methods raise ServiceError, and OSError for a file
    that they can't read. Raises ValueError for negative `retries`.
    """

    def __init__(
        self,
        address: str = "http://127.0.0.1:8000",
        *,
        key: str | None = None,
        timeout: float = 60.0,
        retries: int = 2,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        if retries < 0:
            raise ValueError(f"expected retries of at least 0, got {retries}")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(
            base_url=address, headers=headers, timeout=timeout, transport=transport
        )
        self._timeout, self._retries = timeout, retries

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def predict(self, *images: Source, top_k: int = 5) -> list[Prediction]:
        """The prediction for each image, in order."""
        content = self._post("/predict", images, {"top_k": top_k})
        return [_prediction(item) for item in content["results"]]

    def attack(
        self,
        image: Source,
        attacks: str | Sequence[str] = ("fgsm", "pgd"),
        *,
        eps: float | str | None = None,
        compare: bool = False,
        **parameters: Any,
    ) -> list[Attack]:
        """Run one or more attacks on the image. `eps` is in pixel units, such as "8/255".

        With `compare` the service's comparison model is attacked too. Further parameters are those
        of POST /attack: norm, alpha, steps, restarts, seed, label, target.
        """
        fields = {"attack": _names(attacks), "eps": eps, **parameters}
        if not compare:
            content = self._post("/attack", [image], fields)
            return [_attack(item, content["before"]) for item in content["results"]]
        content = self._post("/attack", [image], {**fields, "compare": "true"})
        other = content["compare"]
        return [
            replace(_attack(item, content["before"]), compare=_attack(of_other, other["before"]))
            for item, of_other in zip(content["results"], other["results"], strict=True)
        ]

    def evaluate(
        self,
        data: Source | None = None,
        attacks: str | Sequence[str] = ("fgsm", "pgd"),
        *,
        dataset: str | None = None,
        wait: float = 0,
        **parameters: Any,
    ) -> Job:
        """Start an evaluation of a labeled npz or pt file, or of a registered `dataset`.

        Waits up to `wait` seconds, rounded up, for the result, within the service's limit. Further
        parameters are those of POST /evaluate: norm, eps, alpha, steps, restarts, seed, limit,
        curve.
        """
        fields = {"attack": _names(attacks), "dataset": dataset, **parameters}
        files = [] if data is None else [data]
        seconds = math.ceil(min(wait, MAX_WAIT))
        content = self._post(
            "/evaluate",
            files,
            fields,
            headers={"Prefer": f"wait={seconds}"},
            timeout=max(self._timeout, seconds + 10),
        )
        return _job(content)

    def job(self, id: str) -> Job:
        """The current state of an evaluation."""
        return _job(self._request("GET", f"/evaluate/{id}"))

    def watch(self, id: str) -> Iterator[Job]:
        """Yield the state of an evaluation after each change, until it has ended."""
        begun, left = False, self._retries
        while True:
            try:
                for job in self._events(id):
                    begun, left = True, self._retries + 1  # one for the end of these events
                    yield job
                return
            except ServiceError as error:
                # A service that stops ends the stream, and its next process continues the job.
                retryable = error.status in _RETRYABLE or (begun and error.status == 0)
                if not left or not retryable:
                    raise
                left -= 1
                _sleep_before_retry(error)

    def _events(self, id: str) -> Iterator[Job]:
        """Yield the job after each change; raises ServiceError if that ends before the job."""
        ended = False
        try:
            with self._http.stream("GET", f"/evaluate/{id}/events") as response:
                if response.is_error:
                    response.read()
                    raise _error(response)
                for line in response.iter_lines():
                    if line.startswith("data:"):
                        job = _job(json.loads(line.removeprefix("data:")))
                        ended = not job.active
                        yield job
        except httpx.TransportError as failure:
            if not ended:
                raise _no_response(failure) from failure
        if not ended:
            problem = {"detail": "the events ended before the evaluation did"}
            raise ServiceError(0, problem, None)

    def cancel(self, id: str) -> Job:
        """Cancel a queued or running evaluation, or delete a finished one with its result."""
        return _job(self._request("DELETE", f"/evaluate/{id}"))

    def model(self) -> dict[str, Any]:
        """The card of the served model."""
        return self._request("GET", "/model")

    def ready(self) -> bool:
        """Whether the service responds and accepts requests."""
        try:
            return self._http.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def _post(
        self, path: str, files: Sequence[Source], fields: Mapping[str, Any], **more: Any
    ) -> dict[str, Any]:
        given = {name: value for name, value in fields.items() if value is not None}
        # Files are read here, so that a request can be repeated.
        parts = [("file", ("file", _content(file))) for file in files]
        # Without a file httpx sends a URL-encoded form, which the service also accepts.
        return self._request("POST", path, data=given, files=parts or None, **more)

    def _request(self, method: str, path: str, **more: Any) -> dict[str, Any]:
        for left in range(self._retries, -1, -1):
            try:
                response = self._http.request(method, path, **more)
            except httpx.TransportError as failure:
                raise _no_response(failure) from failure
            if response.is_success:
                return _content_of(response)
            error = _error(response)
            if not left or response.status_code not in _RETRYABLE:
                break
            _sleep_before_retry(error)
        raise error


def _sleep_before_retry(error: ServiceError) -> None:
    time.sleep(min(error.retry_after or 1.0, MAX_SLEEP))


def _content_of(response: httpx.Response) -> dict[str, Any]:
    try:
        content = response.json()
    except ValueError:
        content = None
    if not isinstance(content, dict):  # for example a page of a proxy
        got = response.headers.get("Content-Type", "no Content-Type")
        problem = {"title": "Not JSON", "detail": f"expected a JSON object, got {got}"}
        raise ServiceError(response.status_code, problem, None)
    return content


def _names(attacks: str | Sequence[str]) -> list[str]:
    return [attacks] if isinstance(attacks, str) else list(attacks)


def _content(source: Source) -> bytes:
    return source if isinstance(source, bytes) else Path(source).read_bytes()


def _no_response(failure: httpx.TransportError) -> ServiceError:
    return ServiceError(0, {"detail": str(failure)}, None)


def _error(response: httpx.Response) -> ServiceError:
    try:
        problem = response.json()
    except ValueError:
        problem = None
    if not isinstance(problem, dict):  # for example a page of a proxy
        problem = {"title": response.reason_phrase}
    after = response.headers.get("Retry-After", "")
    return ServiceError(response.status_code, problem, float(after) if after.isdigit() else None)


T = TypeVar("T", bound=Class | Transfer | Attack | Job)


def _read(kind: type[T], item: Mapping[str, Any], **read: Any) -> T:
    """The object with the fields that `item` has under their names, and those `read` already."""
    named = {field.name: item[field.name] for field in fields(kind) if field.name in item}
    return kind(**named | read)


def _prediction(item: Mapping[str, Any]) -> Prediction:
    return _read(Prediction, item, top=tuple(_read(Class, other) for other in item["top"]))


def _attack(item: Mapping[str, Any], before: Mapping[str, Any]) -> Attack:
    transfer = item.get("transfer")  # an older service has none
    if transfer is not None:
        transfer = _read(Transfer, transfer, after=_prediction(transfer["after"]))
    return _read(
        Attack,
        item,
        name=item["parameters"]["attack"],
        before=_prediction(before),
        after=_prediction(item["after"]),
        image=base64.b64decode(item["adversarial_png"]),
        perturbation=base64.b64decode(item["perturbation_png"]),
        transfer=transfer,
    )


def _job(item: Mapping[str, Any]) -> Job:
    return _read(Job, item)
