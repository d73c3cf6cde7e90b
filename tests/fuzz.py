"""Damaged input for every decoder of untrusted bytes, without a pause, until told to stop.

    python -m tests.fuzz --minutes 60 --seed 1

Each case is one file or body with random damage. It must be read or refused with the decoder's
own error, in less than SECONDS of processor time. Whatever else happens is counted, and the case
is written to `--save`. The exit code is 1 if there was any. What broke once is a test elsewhere.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import itertools
import json
import sys
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import click
import numpy as np
import torch
from safetensors.torch import save as save_safetensors

from app.decoding import frames
from app.errors import ServiceError
from app.http.compression import Inflater
from app.http.open_inference_codec import read_request, write_response
from app.http.uploads import _read_json
from robust.datasets import DatasetError, load_upload
from robust.image_decoding import DecodeCost, open_image, read_cheap_pixels
from robust.image_headers import ImageError
from robust.loading.errors import CheckpointError
from robust.loading.weights import read_weights
from tests.robust.datasets.test_fuzz import UPLOADS, written
from tests.support import broken_images

SECONDS = 0.5  # of processor time for a case of some kilobytes
SIZE = 8
CHEAP = DecodeCost(work=2_000_000, memory=64 * 2**20)
LENGTH = b"length "  # of the JSON of a binary request, in front of the case
VALUES = [
    None, True, False, 0, -1, 1, 7, 255, 2**31, 2**63, 2**64, -(2**63), 10**400, 0.5, 1e308, -0.0,
    float("nan"), float("inf"), "", "x", "\ud800", "\0", "9" * 500, "UINT8", "FP32", "images",
    [], [[]], [None], [1, [2]], ["x"], {}, {"x": 1}, [2, 3, SIZE, SIZE], [2, 3], [0, 3, SIZE, SIZE],
    [2**62, 3, SIZE, SIZE], [1, 3, SIZE, SIZE, 1], {"binary_data_size": 384}, [0] * 384, [1e-400],
]  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A decoder: whole inputs, what reads one, and the errors that it may raise."""

    inputs: list[bytes]
    read: Callable[[bytes], object]
    errors: type[Exception] | tuple[type[Exception], ...]
    inside: bool = False
    """Whether the inputs may be zip files, to be damaged inside, too."""
    json: bool = False
    """Whether the inputs hold JSON, to get other values, too."""


def main() -> int:
    """Run until the time or the number of cases is over; the exit code."""
    options = parse()
    random, every = Random(options.seed), targets()
    cases, refused, failed = Counter[str](), Counter[str](), Counter[str]()
    slowest = dict.fromkeys(every, 0.0)
    end, told = time.monotonic() + 60 * options.minutes, time.monotonic()
    for name in itertools.islice(itertools.cycle(every), options.cases):
        target = every[name]
        data = damaged(random, target)
        begun = time.thread_time()
        fault = ""
        try:
            target.read(data)
        except target.errors:
            refused[name] += 1
        except Exception:
            fault = traceback.format_exc()
        seconds = time.thread_time() - begun
        if seconds > SECONDS:
            fault = f"{seconds:.2f} s of processor time\n{fault}"
        if fault:
            failed[name] += 1
            keep(options.save, f"{name}-{failed[name]}", data, fault)
        cases[name] += 1
        slowest[name] = max(slowest[name], seconds)
        if time.monotonic() > min(end, told + 60):
            told = time.monotonic()
            tell(every, cases, refused, failed, slowest)
        if time.monotonic() > end:
            break
    tell(every, cases, refused, failed, slowest)
    return 1 if failed else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    add = parser.add_argument
    add("--minutes", type=float, default=60.0)
    add("--cases", type=int, default=None, help="of all decoders together")
    add("--seed", type=int, default=0)
    add("--save", type=Path, default=Path("fuzz-failures"), help="folder for what failed")
    return parser.parse_args()


def tell(
    every: dict[str, Target],
    cases: Counter[str],
    refused: Counter[str],
    failed: Counter[str],
    slowest: dict[str, float],
) -> None:
    for name in every:
        click.echo(
            f"{name}: {cases[name]} cases, {refused[name]} refused, {failed[name]} failed, "
            f"slowest {1000 * slowest[name]:.0f} ms"
        )
    click.echo(f"all: {cases.total()} cases, {failed.total()} failed, {time.process_time():.0f} s")


def keep(folder: Path, name: str, data: bytes, fault: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)
    (folder / f"{name}.txt").write_text(fault)
    click.echo(f"{name}: {fault.strip().splitlines()[-1]}", err=True)


def damaged(random: Random, target: Target) -> bytes:
    data, other = random.choice(target.inputs), random.choice(target.inputs)
    if target.inside and data.startswith(b"PK") and random.random() < 0.7:
        return _inside(random, data, other)
    if target.json and random.random() < 0.7:
        return _other_values(random, data)
    return broken_images.mutated(random, data, other)


def _other_values(random: Random, data: bytes) -> bytes:
    """Valid JSON with some of its values exchanged, what follows it as before."""
    start = data.find(b"{")
    value, end = json.JSONDecoder().raw_decode(data[start:].decode("latin-1"))
    for _ in range(random.choice((1, 1, 2, 3))):
        _exchange(random, value)
    text = json.dumps(value).encode()
    head = b"%s%d\n" % (LENGTH, len(text)) if data.startswith(LENGTH) else data[:start]
    return head + text + data[start:][end:]


def _exchange(random: Random, value: Any) -> None:
    while True:
        places = list(value) if isinstance(value, dict) else range(len(value))
        if not places:
            return
        place = random.choice(places)
        below = value[place]
        if not isinstance(below, dict | list) or random.random() < 0.3:
            value[place] = deepcopy(random.choice(VALUES))
            if isinstance(value, dict) and random.random() < 0.2:
                value[random.choice(["data", "parameters", "x", ""])] = value.pop(place)
            return
        value = below


def _inside(random: Random, data: bytes, other: bytes) -> bytes:
    """`data` with one member damaged and all checksums right."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = random.choice(list(members))
    members[name] = broken_images.mutated(random, members[name], other)
    if random.random() < 0.1:
        members[random.choice(["../x.npy", "/x", "images.npy", "data.pkl"])] = other[:99]
    kind = random.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])

    def write(file: io.BytesIO) -> None:
        with zipfile.ZipFile(file, "w", kind) as archive:
            for member, content in members.items():
                archive.writestr(member, content)

    return written(write)


def targets() -> dict[str, Target]:
    """Every decoder by name."""
    uploads = {
        "npz": [data for data in UPLOADS if _is_npz(data)],
        "pt": [data for data in UPLOADS if data.startswith(b"PK") and not _is_npz(data)],
        "pickle": [data for data in UPLOADS if not data.startswith(b"PK")],
    }
    images = {
        kind.lower(): Target(files, read_image, ImageError)
        for kind, files in broken_images.whole_images().items()
    }
    return {
        **images,
        **{name: Target(data, read_set, DatasetError, True) for name, data in uploads.items()},
        "safetensors": Target(list(weights()), read_safetensors, CheckpointError),
        "oip": Target(list(oip_requests()), read_oip, ServiceError, json=True),
        "json": Target(
            list(json_bodies()),
            lambda data: asyncio.run(_read_json(data, 4)),
            ServiceError,
            json=True,
        ),
        "gzip": Target(list(compressed()), inflate, ServiceError),
        "worker": Target(list(answers()), read_answer, ValueError),
    }


def _is_npz(data: bytes) -> bool:
    return data.startswith(b"PK") and b".npy" in data[:200]


def read_image(data: bytes) -> object:
    """On the fast path where it is cheap; GIF and the like as from a user's own folder."""
    if data[:3] in (b"GIF", b"BM", b"II*", b"MM\0"):
        return open_image(data, size=SIZE, max_pixels=1_000_000, any_format=True)
    pixels = read_cheap_pixels(data, SIZE, most=CHEAP, max_pixels=1_000_000)
    if not isinstance(pixels, DecodeCost):
        assert (pixels.shape, pixels.dtype) == ((3, SIZE, SIZE), np.uint8)
    return pixels


def read_set(data: bytes) -> object:
    dataset = load_upload(data, "x", size=SIZE, max_images=50)
    assert 1 <= len(dataset) <= 50
    assert dataset.images.shape[1:] == (3, SIZE, SIZE)
    assert int(dataset.labels.min()) >= 0
    return dataset


def weights() -> Iterator[bytes]:
    tensors = {"conv.weight": torch.randn(2, 3), "fc.bias": torch.zeros(4, dtype=torch.float16)}
    yield save_safetensors(tensors)
    yield save_safetensors({"module.fc.weight": torch.ones(2, 2)}, {"classes": "a,b"})


def read_safetensors(data: bytes) -> object:
    return read_weights(Path("x.safetensors"), data, known=lambda state: False)


def oip_requests() -> Iterator[bytes]:
    """Binary and JSON requests; the length of the JSON is told in front, as in the header."""
    shape = [2, 3, SIZE, SIZE]
    values = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    for datatype, raw in (
        ("UINT8", values.tobytes()),
        ("FP32", (values / np.float32(255)).tobytes()),
    ):
        tensor = {"name": "images", "datatype": datatype, "shape": shape}
        tensor["parameters"] = {"binary_data_size": len(raw)}
        outputs = [{"name": "probabilities", "parameters": {"binary_data": True}}]
        text = json.dumps({"id": "1", "inputs": [tensor], "outputs": outputs}).encode()
        yield b"%s%d\n%s%s" % (LENGTH, len(text), text, raw)
    small = values[:1]
    for data in (small.tolist(), small.ravel().tolist()):
        tensor = {"name": "images", "datatype": "UINT8", "shape": list(small.shape), "data": data}
        outputs = [
            {"name": "label", "parameters": {"binary_data": True}},
            {"name": "probabilities", "parameters": {"classification": 3}},
        ]
        body = {"inputs": [tensor], "outputs": outputs, "parameters": {"binary_data_output": True}}
        yield json.dumps(body).encode()


def read_oip(data: bytes) -> object:
    length = None
    if data.startswith(LENGTH) and b"\n" in data[:40]:
        line, _, data = data.partition(b"\n")
        length = line[len(LENGTH) :].decode("latin-1")
    asked = read_request(data, length, size=SIZE, limit=4)
    assert asked.images.shape[1:] == (3, SIZE, SIZE)
    assert 1 <= len(asked.images) <= 4
    if asked.images.dtype == torch.float32:
        assert ((asked.images >= 0) & (asked.images <= 1)).all()
    rows = torch.softmax(torch.randn(len(asked.images), 5), dim=1)
    body, text = write_response(asked, rows, list("abcde"), version="0")
    json.loads(body[:text])
    return asked


def json_bodies() -> Iterator[bytes]:
    image = "iVBORw0KGgo="
    yield json.dumps({"image": image, "eps": "8/255", "attack": ["pgd", "fgsm"]}).encode()
    yield json.dumps({"images": [image, f"data:image/png;base64,{image}"], "top_k": 3}).encode()
    yield b'{"image": [], "steps": 1e400, "x": [[[]]], "y": {"z": null}, "w": "\\ud800"}'


def compressed() -> Iterator[bytes]:
    """Each begins with a byte for its encoding."""
    import gzip
    import zlib

    body = bytes(range(256)) * 20
    raw = zlib.compressobj(wbits=-15)
    yield b"g" + gzip.compress(body)
    yield b"d" + zlib.compress(body)
    yield b"d" + raw.compress(bytes(300_000)) + raw.flush()


def inflate(data: bytes) -> object:
    inflater = Inflater("gzip" if data[:1] == b"g" else "deflate")
    size, fed = 0, data[1:]
    while fed or inflater.waiting:
        piece = inflater.inflate(fed[:1000])
        fed, size = fed[1000:], size + len(piece)
        if size > 2**22:  # the limit on bodies stops it
            break
    return size


def answers() -> Iterator[bytes]:
    """What a decode worker sends."""
    yield frames.pack({}, [bytes(192)])
    yield frames.pack({"error": "set", "source": "x", "expected": "a", "found": "b"}, [])
    yield frames.pack({"name": "x", "classes": ["a"], "images": 1}, [bytes(192), bytes(8)])


def read_answer(data: bytes) -> object:
    """As `WorkerPool` reads it; a worker that sends too little is one that has ended."""
    if len(data) < frames.PREFIX.size:
        return None
    length = frames.header_length(data[: frames.PREFIX.size])
    header, lengths = frames.unpack(data[frames.PREFIX.size :][:length], most=1000)
    assert isinstance(header, dict)
    assert sum(lengths) <= 1000
    return header


if __name__ == "__main__":
    sys.exit(main())
