"""Every setting is described, read from its variable, and refused when it makes no sense."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from app.settings import Settings


def test_every_setting_has_one_line_of_description() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name
        assert len(field.description) <= 100, name


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROBUST_CHECKPOINT", "/data/model.pt")
    monkeypatch.setenv("ROBUST_MAX_STEPS", "7")
    monkeypatch.setenv("ROBUST_UNKNOWN", "ignored")
    settings = Settings()
    assert (settings.checkpoint, settings.max_steps) == (Path("/data/model.pt"), 7)
    assert Settings(max_steps=8).max_steps == 8  # what is given wins


@pytest.mark.parametrize(
    "given",
    [{"max_steps": 0}, {"deadline_seconds": 0}, {"max_eps_linf": 1.1}, {"log_format": "xml"}],
)
def test_settings_that_make_no_sense(given: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Settings(**given)  # type: ignore[arg-type]


def test_an_empty_variable_is_one_that_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.setenv(f"ROBUST_{name.upper()}", "")
    assert Settings() == Settings.model_construct()


def test_largest_eps_as_a_fraction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROBUST_MAX_EPS_LINF", "32/255")
    assert Settings().max_eps("linf") == 32 / 255
    monkeypatch.setenv("ROBUST_MAX_EPS_LINF", "320/255")
    with pytest.raises(ValueError, match="less than or equal to 1"):
        Settings()
    monkeypatch.setenv("ROBUST_MAX_EPS_LINF", "much")
    with pytest.raises(ValueError, match="a fraction such as 8/255"):
        Settings()
