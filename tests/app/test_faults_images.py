"""Broken images of every format: an image or an error that says so, never a 5xx."""

from __future__ import annotations

import time
from collections import Counter

import pytest

from robust.images import ImageError, decode_image, fit_image
from tests.app.http.test_errors import assert_problem
from tests.support.broken_images import broken_images
from tests.support.faults import Peak, unharmed
from tests.support.serving import Running

MAX_PIXELS = 1_000_000
OUTCOMES = {"decoded", "empty", "broken", "unsupported", "too_large"}


def outcome_of(data: bytes) -> str:
    try:
        image = decode_image(data, max_pixels=MAX_PIXELS)
    except ImageError as error:
        return error.kind
    assert image.mode == "RGB"
    assert image.width * image.height <= MAX_PIXELS
    assert fit_image(image, 32).shape == (3, 32, 32)
    return "decoded"


@pytest.mark.parametrize("n", [10_000, pytest.param(200_000, marks=pytest.mark.slow)])
def test_mutated_image_decodes_or_is_rejected(n: int) -> None:
    peak, seen, longest = Peak(), Counter[str](), 0.0
    for data in broken_images(n, seed=n):
        began = time.thread_time()
        seen[outcome_of(data)] += 1
        longest = max(longest, time.thread_time() - began)
    assert seen.total() == n
    assert set(seen) == OUTCOMES
    # Both far from none: what is mutated too much tests the first bytes only.
    assert min(seen["decoded"], seen["broken"], seen["unsupported"]) > n / 20
    assert longest < 5
    assert peak.grown() < 100 * 2**20


@pytest.mark.parametrize("n", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutated_images_over_http_never_bring_a_5xx(running: Running, n: int) -> None:
    seen = Counter[int]()
    with unharmed(running):
        for index, data in enumerate(broken_images(n, seed=1)):
            path = "/attack?attack=fgsm" if index % 5 == 0 else "/predict"
            response = running.client.post(path, files={"file": data})
            seen[response.status_code] += 1
            if response.status_code != 200:
                assert_problem(response, response.status_code)
    assert set(seen) <= {200, 400, 413, 415}, seen
    assert min(seen[200], seen[400], seen[415]) > n / 20
