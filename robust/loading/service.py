"""Models served over the Open Inference Protocol, by Triton, KServe or our own service.

https://github.com/kserve/open-inference-protocol, REST, with binary tensors if both support them.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import torch
from torch import Tensor

from robust.loading.errors import CheckpointError
from robust.loading.given import SERVICE, Given

HEADER_LENGTH = "Inference-Header-Content-Length"
TIMEOUT = 60.0  # seconds for a response
RETRIES = 8  # attempts of a request while the service is too busy
MAX_WAIT = 10.0  # seconds before a retry
BATCH = 64  # images per request; fewer if the service accepts fewer
_KINDS: dict[str, Any] = {
    "FP32": np.dtype("<f4"),
    "FP16": np.dtype("<f2"),
    "FP64": np.dtype("<f8"),
    "UINT8": np.dtype("u1"),
}


def open_service(spec: str) -> Given:
    """Read the inputs and outputs of a service's model. Raises CheckpointError."""
    url = SERVICE.sub(r"\1://", spec).rstrip("/")
    client = httpx.Client(timeout=TIMEOUT, headers={"Accept": "application/json"})
    metadata = _get(client, spec, url)
    try:
        entry, outputs = metadata["inputs"][0], metadata["outputs"]
        shape = [int(side) for side in entry["shape"]]
        kind, name = str(entry["datatype"]), str(entry["name"])
        scores = _scores(outputs)
        versions = [str(item) for item in metadata.get("versions") or ()]
    except (KeyError, IndexError, TypeError, ValueError):
        raise CheckpointError(
            spec, "metadata of the Open Inference Protocol", json.dumps(metadata)[:200]
        ) from None
    if kind not in _KINDS or len(shape) not in (3, 4) or 3 not in (shape[-3], shape[-1]):
        raise CheckpointError(
            spec, f"images as {', '.join(_KINDS)} with 3 channels", f"{name} {kind} {shape}"
        )
    if scores is None:
        found = json.dumps(outputs)[:200]
        raise CheckpointError(spec, "an output with a score for each class", found)
    channels_last = shape[-3] != 3
    side = shape[-2]
    server = _get(client, spec, url.partition("/models/")[0], optional=True)
    extensions = server.get("extensions")
    model = _Service(
        spec=spec,
        url=f"{url}/infer",
        client=client,
        input_name=name,
        kind=kind,
        channels_last=channels_last,
        batched=len(shape) == 4,
        output=scores,
        binary=isinstance(extensions, list) and "binary_tensor_data" in extensions,
    )
    known = len(versions) == 1 and re.fullmatch("[0-9a-f]{64}", versions[0])
    notes = [f"a service that returns {scores} for images as {kind}"]
    if kind == "UINT8":
        notes.append("images are rounded to 8 bits in requests")
    return Given(
        kind="service",
        function=model,
        sha256=versions[0] if known else hashlib.sha256(f"{url} {versions}".encode()).hexdigest(),
        weights_hashed=bool(known),
        differentiable=False,
        input_size=side if side > 0 else None,
        notes=tuple(notes),
    )


def _scores(outputs: list[dict[str, Any]]) -> str | None:
    """The output to request: logits, else probabilities, else any matrix of floats."""
    floats = [
        str(item["name"])
        for item in outputs
        if item["datatype"] in _KINDS and item["datatype"] != "UINT8" and len(item["shape"]) <= 2
    ]
    named = [name for word in ("logit", "prob", "score") for name in floats if word in name.lower()]
    return next(iter([*named, *floats]), None)


def _get(client: httpx.Client, spec: str, url: str, *, optional: bool = False) -> dict[str, Any]:
    try:
        value = client.get(url).raise_for_status().json()
        if isinstance(value, dict):
            return value
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        if optional:
            return {}
        raise CheckpointError(spec, "a model of a service", f"{error}"[:300]) from None
    return {}


@dataclass(kw_only=True)
class _Service:
    """Images float32 (N, 3, S, S) to the service's scores float32 (N, K)."""

    spec: str
    url: str
    client: httpx.Client
    input_name: str
    kind: str
    channels_last: bool
    batched: bool  # whether its tensors have a batch dimension
    output: str
    binary: bool
    batch: int = BATCH

    def __call__(self, x: Tensor) -> Tensor:
        pixels = x.detach().cpu().float()
        if self.channels_last:
            pixels = pixels.permute(0, 2, 3, 1)
        if self.kind == "UINT8":
            pixels = (pixels * 255).round()
        values = pixels.contiguous().numpy().astype(_KINDS[self.kind])
        parts, start = [], 0
        while start < len(values):
            part = values[start : start + (self.batch if self.batched else 1)]
            scores = self._send(part)
            if scores is None:  # too many images
                self.batch = max(1, len(part) // 2)
                continue
            parts.append(scores)
            start += len(part)
        return torch.from_numpy(np.concatenate(parts)).to(x.device)

    def _send(self, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any] | None:
        """Scores float32 (n, K); None if the service refuses that many images in one request."""
        content, headers = self._request(values)
        for attempt in range(RETRIES):
            try:
                response = self.client.post(self.url, content=content, headers=headers)
            except httpx.HTTPError as error:
                raise CheckpointError(self.spec, "a response", f"{error}"[:200]) from None
            if response.status_code not in (429, 503) or attempt == RETRIES - 1:
                break
            seconds = response.headers.get("Retry-After", "")
            time.sleep(min(MAX_WAIT, float(seconds) if seconds.isdigit() else 0.1 * 2**attempt))
        if response.status_code in (400, 413, 422) and len(values) > 1:
            return None
        if response.status_code != 200:
            raise CheckpointError(
                self.spec, "a response", f"status {response.status_code}: {response.text[:200]}"
            )
        try:
            return self._scores(response, len(values))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                self.spec, f"{self.output} of {len(values)} images", f"{error}"[:200]
            ) from None

    def _request(self, values: np.ndarray[Any, Any]) -> tuple[bytes, dict[str, str]]:
        shape = list(values.shape if self.batched else values.shape[1:])
        tensor: dict[str, Any] = {"name": self.input_name, "datatype": self.kind, "shape": shape}
        if not self.binary:
            tensor["data"] = values.flatten().tolist()
            body = {"inputs": [tensor], "outputs": [{"name": self.output}]}
            return json.dumps(body).encode(), {"Content-Type": "application/json"}
        raw = values.tobytes()
        tensor["parameters"] = {"binary_data_size": len(raw)}
        output = {"name": self.output, "parameters": {"binary_data": True}}
        text = json.dumps({"inputs": [tensor], "outputs": [output]}).encode()
        return text + raw, {
            "Content-Type": "application/octet-stream",
            HEADER_LENGTH: str(len(text)),
        }

    def _scores(self, response: httpx.Response, n: int) -> np.ndarray[Any, Any]:
        """The scores in a response. Raises KeyError, TypeError and ValueError if it has none."""
        length = response.headers.get(HEADER_LENGTH)
        text = response.content if length is None else response.content[: int(length)]
        raw = b"" if length is None else response.content[int(length) :]
        for output in json.loads(text)["outputs"]:
            size = int((output.get("parameters") or {}).get("binary_data_size", 0))
            part, raw = raw[:size], raw[size:]
            if output["name"] != self.output:
                continue
            kind = _KINDS[output["datatype"]]
            values = (
                np.frombuffer(part, dtype=kind)
                if size
                else np.asarray(output["data"], dtype=np.float64)
            )
            if values.size % n or math.prod(output["shape"]) != values.size:
                raise ValueError(f"{values.size} numbers of shape {output['shape']}")
            return values.astype(np.float32).reshape(n, -1)
        raise KeyError(f"no {self.output}")
