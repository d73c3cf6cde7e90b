"""What schemathesis draws from the OpenAPI document is answered as the document says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import schemathesis
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from app.application import create_app
from app.settings import Settings
from tests.support.faults import unharmed
from tests.support.serving import Running, jpeg, labeled, png, serving

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
DOCUMENT = schemathesis.openapi.from_dict(create_app(Settings(device="cpu")).openapi())
# Files are drawn from whole ones too: of random bytes hardly anything gets past the first look.
FILES = [png(), jpeg(), labeled(3), png()[:200], b""]
schemathesis.openapi.format("binary", st.sampled_from(FILES) | st.binary(max_size=64))


@pytest.fixture(scope="module")
def drawn(checkpoint: Path) -> Iterator[Running]:
    with serving(Settings(checkpoint=checkpoint, threads=1, device="cpu", max_steps=3)) as running:
        yield running


@pytest.mark.parametrize("n", [20, pytest.param(1000, marks=pytest.mark.slow)])
def test_what_is_drawn_from_the_document_is_answered_as_it_says(drawn: Running, n: int) -> None:
    seen = Counter[int]()

    def ask(case: schemathesis.Case) -> None:
        response = case.call(base_url=drawn.url)
        seen[response.status_code] += 1
        case.validate_response(response, checks=CHECKS)

    with unharmed(drawn):
        for result in DOCUMENT.get_all_operations():
            operation = result.ok()
            # Any text may stand in an address: only a body can be wrong.
            for mode in GenerationMode if operation.body else [GenerationMode.POSITIVE]:
                cases = operation.as_strategy(mode)
                hypothesis.settings(
                    max_examples=n,
                    deadline=None,
                    derandomize=True,
                    database=None,
                    phases=[hypothesis.Phase.generate],
                    suppress_health_check=list(hypothesis.HealthCheck),
                )(hypothesis.given(case=cases)(ask))()
    assert max(seen) < 500, seen
    assert {200, 400, 404, 415, 422} <= set(seen), seen
