"""Log lines name their request and can be JSON."""

import json
import logging

import pytest
import torch
from torch import Tensor

from app import logs
from app.settings import Settings
from tests.support.serving import Running, png


def test_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(Settings(log_format="json", log_level="warning"))
    token = logs.request_id.set("abc")
    try:
        logging.getLogger("x").info("not shown")
        logging.getLogger("x").warning("two\nlines")
        try:
            raise ValueError("why")
        except ValueError:
            logging.getLogger("x").exception("failed")
    finally:
        logs.request_id.reset(token)
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert (first["level"], first["message"], first["request_id"]) == (
        "warning",
        "two\nlines",
        "abc",
    )
    assert "ValueError: why" in second["exception"]


def test_log_lines_from_every_thread_name_their_request(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, str]] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.name != "httpx":  # the test's own client
                seen.append((record.getMessage(), logs.request_id.get()))

    root = logging.getLogger()  # put back after each test
    root.addHandler(Handler())
    root.setLevel("INFO")
    from app.http import images

    def decode(*arguments: object, **more: object) -> object:
        logging.getLogger("x").info("decoding")
        return original(*arguments, **more)  # type: ignore[arg-type]

    class Talking(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            logging.getLogger("x").info("computing")
            return torch.zeros(len(x), 10)

    original = images._decode_if_cheap
    monkeypatch.setattr(images, "_decode_if_cheap", decode)
    models = running.service.models
    current = models.current
    from dataclasses import replace

    talking = replace(current, classifier=Talking(), fast=None, plan=None)  # type: ignore[arg-type]
    monkeypatch.setattr(models, "_current", talking)
    for path, name in (("/predict", "one"), ("/attack?attack=fgsm", "two")):
        response = running.client.post(path, content=png(), headers={"X-Request-ID": name})
        assert response.status_code in (200, 500)
        mine = {message for message, request_id in seen if request_id == name}
        assert {"decoding", "computing"} <= mine  # the line of the request may come later
    assert not [message for message, request_id in seen if request_id == "-"]
