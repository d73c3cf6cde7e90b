"""What the figures of benchmarks/playground.py and benchmarks/priority.py rest on."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import playground, priority
from tests.app.conftest import write_checkpoint


def test_measurements_take_turns_and_the_first_turn_warms_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    order: list[str] = []

    def timed(name: str, milliseconds: float) -> float:
        order.append(name)
        return milliseconds + len(order)

    def slider(page: object, name: str, **marks: str) -> Any:
        return lambda turn: timed(name, 100.0)

    model = SimpleNamespace(json=lambda: {"compare": None})
    monkeypatch.setattr("httpx.get", lambda url: model)
    monkeypatch.setattr(playground, "opened", lambda *_: None)
    monkeypatch.setattr(playground, "slider", slider)
    monkeypatch.setattr(playground, "usable", lambda *_: timed("usable", 200.0))
    monkeypatch.setattr(playground, "smallest", lambda *_: timed("smallest", 300.0))
    found = playground.measure(None, "", 2)  # type: ignore[arg-type]
    assert order == ["usable", "fgsm", "pgd", "smallest"] * 3
    assert found["page usable"] == [205, 209]
    playground.report(found)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == "page usable median 207 ms (205 to 209) of 2".split()


def test_waits_are_pooled_and_spread_over_blocks() -> None:
    line = priority.shown("idle", [[1.0] * 99 + [9.0], [2.0] * 300])
    assert line.split() == ("idle p50 2.0 ms (1.0 to 2.0), p99 2.0 ms, 400 predictions".split())


@pytest.mark.slow
def test_predictions_are_timed_without_and_with_an_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path / "model.pt")
    command = ["priority", "--checkpoint", str(tmp_path / "model.pt"), "--seconds", "1"]
    monkeypatch.setattr("sys.argv", [*command, "--blocks", "2", "--images", "500"])
    priority.main()
    names = [line[:18].rstrip() for line in capsys.readouterr().out.splitlines()]
    assert names == ["idle", "during evaluation", "step", "goal"]


def test_an_evaluation_that_ended_during_the_block_is_refused() -> None:
    client = SimpleNamespace(get=lambda url: SimpleNamespace(json=lambda: {"state": "done"}))
    with pytest.raises(SystemExit, match="the evaluation is done: use more --images"):
        priority.cancel(client, "/evaluate/1")  # type: ignore[arg-type]
