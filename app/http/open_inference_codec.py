"""The REST form of the Open Inference Protocol: parses requests, and writes responses.

See https://github.com/kserve/open-inference-protocol. With its extension for binary tensor data, a
body is JSON, whose length is in a header, followed by the raw tensors.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json
from torch import Tensor

from app.errors import BadRequest, BodyTooLarge

MODEL = "robust"
INPUT = "images"
HEADER_LENGTH = "Inference-Header-Content-Length"
# Parsing JSON holds the GIL, and so delays every other request.
MAX_JSON_BYTES = 8 * 2**20
SPARE_VALUES = 1000  # values that a request may have in addition to the images
KINDS: dict[str, Any] = {"UINT8": np.dtype("u1"), "FP32": np.dtype("<f4")}

OutputName = Literal["probabilities", "index", "label"]
OUTPUTS: dict[OutputName, str] = {"probabilities": "FP32", "index": "INT64", "label": "BYTES"}


class _Lenient(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)


class InputTensor(_Lenient):
    """The images of a request."""

    name: Literal["images"]
    datatype: Literal["UINT8", "FP32"]
    shape: list[int] = Field(description="(N, 3, H, W), of the model's size.")
    parameters: dict[str, Any] = Field(default_factory=dict)
    data: list[Any] | None = Field(
        default=None, description="Row by row, nested or flat; FP32 in [0, 1], UINT8 up to 255."
    )


class AskedOutput(_Lenient):
    """A requested output tensor."""

    name: OutputName
    parameters: dict[str, Any] = Field(default_factory=dict)


class InferRequest(_Lenient):
    """The request of POST /v2/models/robust/infer."""

    id: str | None = Field(default=None, max_length=200)
    parameters: dict[str, Any] = Field(default_factory=dict)
    inputs: list[InputTensor] = Field(min_length=1, max_length=1)
    outputs: list[AskedOutput] = Field(default_factory=list, max_length=len(OUTPUTS))


class OutputTensor(BaseModel):
    """One tensor of the response."""

    name: OutputName
    datatype: Literal["FP32", "INT64", "BYTES"]
    shape: list[int]
    data: list[float] | list[int] | list[str] | None = None
    parameters: dict[str, int] | None = None


class InferResponse(BaseModel):
    """The response of POST /v2/models/robust/infer."""

    model_config = ConfigDict(protected_namespaces=())

    model_name: Literal["robust"] = "robust"
    model_version: str = Field(description="SHA-256 of the weights that computed this.")
    id: str | None = None
    outputs: list[OutputTensor]


@dataclass(frozen=True, kw_only=True)
class TensorRequest:
    """A parsed request."""

    id: str | None
    images: Tensor  # uint8, or float32 in [0, 1], (n, 3, size, size)
    outputs: dict[OutputName, bool]  # whether each is returned as binary data
    top: int | None = None  # number of likeliest classes to return, as text


def read_request(body: bytes, header_length: str | None, *, size: int, limit: int) -> TensorRequest:
    """Parse a request for at most `limit` images. Raises BadRequest or BodyTooLarge."""
    text, raw = _split(body, header_length)
    if len(text) > MAX_JSON_BYTES:
        raise BodyTooLarge(
            MAX_JSON_BYTES, "JSON; send larger tensors as binary data, or as images to /predict"
        )
    # Every number and list becomes a Python object: refuse more than a valid request can have.
    numbers, lists = limit * 3 * size * size, limit * (3 * size + 4)
    if text.count(b",") + text.count(b"[") > numbers + 2 * lists + SPARE_VALUES:
        raise BadRequest(f"data: expected at most {numbers} numbers, those of {limit} images")
    try:
        request = InferRequest.model_validate(from_json(text))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if str(part) in _NAMES) or "request"
        expected = first["msg"].removeprefix("Input should be ")
        raise BadRequest(f"{where}: expected {expected}") from None
    except ValueError:
        raise BadRequest("expected a body of JSON") from None
    (tensor,) = request.inputs
    shape = tuple(tensor.shape)
    if len(shape) != 4 or shape[1:] != (3, size, size) or not 1 <= shape[0] <= limit:
        raise BadRequest(
            f"shape: expected [N, 3, {size}, {size}] of 1 to {limit} images, "
            f"got {str(list(shape))[:60]}"
        )
    values = _values(tensor, raw)
    everything = bool(request.parameters.get("binary_data_output", False))
    top = _class_count(request.outputs)
    names: list[AskedOutput] = request.outputs or [AskedOutput(name=name) for name in OUTPUTS]
    return TensorRequest(
        id=request.id,
        images=torch.from_numpy(values.reshape(shape)),
        outputs={item.name: bool(item.parameters.get("binary_data", everything)) for item in names},
        top=top,
    )


def write_response(
    asked: TensorRequest, probabilities: Tensor, classes: Sequence[str], *, version: str
) -> tuple[bytes, int | None]:
    """The body of the response, and the length of its JSON if raw tensors follow."""
    outputs: list[dict[str, Any]] = []
    parts: list[bytes] = []
    indices = probabilities.argmax(dim=1)
    for name, binary in asked.outputs.items():
        data: list[Any]
        datatype, shape = OUTPUTS[name], [len(probabilities)]
        if name == "probabilities" and asked.top is None:
            shape.append(probabilities.shape[1])
        if name == "label" or (name == "probabilities" and asked.top is not None):
            data = [classes[index] for index in indices.tolist()]
            if name == "probabilities":
                datatype, data = "BYTES", _top(probabilities, asked.top or 1, classes)
                shape.append(len(data) // len(probabilities))
            raw = b"".join(
                struct.pack("<I", len(text)) + text for text in (item.encode() for item in data)
            )
        else:
            values = probabilities if name == "probabilities" else indices
            data, raw = values.flatten().tolist(), values.contiguous().numpy().tobytes()
        output: dict[str, Any] = {"name": name, "datatype": datatype, "shape": shape}
        if binary:
            parts.append(raw)
            outputs.append(output | {"parameters": {"binary_data_size": len(raw)}})
        else:
            outputs.append(output | {"data": data})
    answer = {"model_name": MODEL, "model_version": version, "outputs": outputs}
    if asked.id is not None:
        answer["id"] = asked.id
    text = json.dumps(answer).encode()
    return b"".join([text, *parts]), len(text) if parts else None


def _class_count(outputs: Sequence[AskedOutput]) -> int | None:
    """The number of classes in `classification` (`class_count` in Triton's client), or None.

    Raises BadRequest.
    """
    for item in outputs:
        for name in ("classification", "class_count"):
            count = item.parameters.get(name, 0)
            if type(count) is not int or count < 0:
                raise BadRequest(f"{name}: expected a whole number of classes")
            if count and item.name != "probabilities":
                raise BadRequest(f"{name}: expected it for the output probabilities")
            if count:
                return count
    return None


def _top(probabilities: Tensor, count: int, classes: Sequence[str]) -> list[str]:
    """The likeliest classes of each image, flattened, in Triton's format: value:index:label."""
    values, indices = probabilities.topk(min(count, probabilities.shape[1]), dim=1)
    pairs = zip(values.flatten().tolist(), indices.flatten().tolist(), strict=True)
    return [f"{value:f}:{index}:{classes[index]}" for value, index in pairs]


_NAMES = frozenset({*InferRequest.model_fields, *InputTensor.model_fields})


def _split(body: bytes, header_length: str | None) -> tuple[bytes, bytes]:
    if header_length is None:
        return body, b""
    valid = header_length.isascii() and header_length.isdigit() and len(header_length) < 12
    if not valid or int(header_length) > len(body):
        raise BadRequest(f"expected {HEADER_LENGTH} to be the length of the JSON in the body")
    return body[: int(header_length)], body[int(header_length) :]


def _values(tensor: InputTensor, raw: bytes) -> np.ndarray[Any, Any]:
    """The tensor's values, flat and validated. Raises BadRequest."""
    kind, count = KINDS[tensor.datatype], math.prod(tensor.shape)
    values: np.ndarray[Any, Any]
    if "binary_data_size" in tensor.parameters or tensor.data is None:
        declared = tensor.parameters.get("binary_data_size")
        if declared != len(raw) or len(raw) != count * kind.itemsize:
            raise BadRequest(
                f"data: expected {count} numbers, or {count * kind.itemsize} bytes after the JSON "
                f"and binary_data_size to say so, got {len(raw)} bytes"
            )
        values = np.frombuffer(raw, dtype=kind).copy()
    else:
        try:
            exact = np.asarray(tensor.data, dtype=np.float64).reshape(-1)
        except (ValueError, TypeError, OverflowError):
            raise BadRequest("data: expected numbers, flat or nested as the shape says") from None
        if len(exact) != count:
            raise BadRequest(f"data: expected {count} numbers, got {len(exact)}")
        whole = (exact == exact.round()) & (exact >= 0) & (exact <= 255)
        if tensor.datatype == "UINT8" and not whole.all():
            raise BadRequest("data: expected whole numbers from 0 to 255")
        values = exact.astype(kind)
    if tensor.datatype == "FP32" and not ((values >= 0) & (values <= 1)).all():
        raise BadRequest("data: expected numbers from 0 to 1")
    return values
