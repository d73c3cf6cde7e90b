"""Every setting is described, read from its variable, and rejected when invalid."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from app.application import create_app
from app.configuration import page
from app.engine.attack_batch import cost
from app.errors import ServeError
from app.server import read_settings
from app.settings import Settings, unknown_variables
from robust.attacks import resolve_attack
from robust.commands.options import DESCRIBED
from robust.loading import ModelOptions
from robust.threat_model import ThreatModel


def test_every_setting_has_a_one_line_description() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name
        assert len(field.description) <= 100, name


def test_settings_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_invalid_settings_are_rejected(given: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Settings(**given)  # type: ignore[arg-type]


def test_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.setenv(f"ROBUST_{name.upper()}", "")
    assert Settings() == Settings.model_construct(compare="")  # where it means none


def test_comparison_model_defaults_to_the_checkpoints_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    checkpoint, plain = tmp_path / "robust_model.pt", tmp_path / "plain_model.pt"
    assert Settings(checkpoint=checkpoint).compare_path is None
    plain.touch()
    assert Settings(checkpoint=checkpoint).compare_path == plain
    assert Settings(checkpoint=plain).compare_path is None  # a model beside itself
    monkeypatch.setenv("ROBUST_COMPARE", "")
    assert Settings(checkpoint=checkpoint).compare_path is None
    monkeypatch.setenv("ROBUST_COMPARE", "/nowhere/other.pt")
    assert Settings(checkpoint=checkpoint).compare_path == Path("/nowhere/other.pt")


def test_model_options_for_a_file_without_a_sidecar(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"ARCH": "timm:x", "MEAN": "imagenet", "STD": "0.2,0.2,0.2", "CLASSES": "cat, dog"}
    for name, value in {**said, "INPUT_SIZE": "64"}.items():
        monkeypatch.setenv(f"ROBUST_{name}", value)
    assert Settings().model_options() == ModelOptions(
        arch="timm:x",
        mean=(0.485, 0.456, 0.406),
        std=(0.2, 0.2, 0.2),
        classes=("cat", "dog"),
        input_size=64,
    )
    assert set(DESCRIBED) < set(Settings.model_fields)
    monkeypatch.setenv("ROBUST_MEAN", "1,2")
    with pytest.raises(
        ServeError, match=r"^ROBUST_MEAN: expected 3 numbers or one of none, .*, got"
    ):
        read_settings()


def test_max_eps_may_be_a_fraction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROBUST_MAX_EPS_LINF", "32/255")
    assert Settings().max_eps("linf") == 32 / 255
    monkeypatch.setenv("ROBUST_MAX_EPS_LINF", "320/255")
    with pytest.raises(ValueError, match="less than or equal to 1"):
        Settings()
    monkeypatch.setenv("ROBUST_MAX_EPS_LINF", "much")
    with pytest.raises(ValueError, match="a fraction such as 8/255"):
        Settings()


@pytest.mark.parametrize(
    ("name", "value"), [("MAX_STEPS", "2_0"), ("MAX_IMAGES", "٣"), ("GRACE_SECONDS", "1_0.5")]
)
def test_numbers_must_be_plain_ascii(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"ROBUST_{name}", value)
    with pytest.raises(ValidationError, match="digits 0 to 9"):
        Settings()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("MAX_EPS_LINF", "much", "a number of at least 0 or a fraction such as 8/255, got 'much'"),
        ("MAX_STEPS", "many", "a number in digits 0 to 9, got 'many'"),
        ("DATASETS", "/no/such/folder", "a folder that exists, got '/no/such/folder'"),
        ("TRACES", "ftp://me:password@x", "http:// or https://, got text of 19 characters"),
        ("ROOT_PATH", "rob", "a path such as /robust, without a slash at the end, got 'rob'"),
    ],
)
def test_error_names_the_variable_and_shows_its_value(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(f"ROBUST_{name}", value)
    with pytest.raises(ServeError) as caught:
        read_settings()
    text = str(caught.value)
    assert text.startswith(f"ROBUST_{name}: expected ")
    assert text.endswith(message)
    assert text.count("expected") == text.count("got") == 1


def test_variable_that_is_no_setting_is_named_with_the_closest_one() -> None:
    settings = {"ROBUST_API_KEYS": "a", "robust_max_steps": "3", "ROBUST_COMPARE": ""}
    others = {"PATH": "/bin", "ROBUST_TEST_SET": "test.npz", "_ROBUST_COMPLETE": "bash_source"}
    kubernetes = {
        "ROBUST_SERVICE_HOST": "10.0.0.1",
        "ROBUST_SERVICE_PORT_HTTP": "80",
        "ROBUST_PORT": "tcp://10.0.0.1:80",
        "ROBUST_PORT_80_TCP_ADDR": "10.0.0.1",
        "ROBUST_DATABASE_PORT": "tcp://10.0.0.1:5432",
    }
    assert unknown_variables(settings | others | kubernetes) == []
    assert unknown_variables({"ROBUST_APIKEYS": "secret", "ROBUST_PORT": "80"}) == [
        "ROBUST_APIKEYS is not a setting and is ignored; did you mean ROBUST_API_KEYS?",
        "ROBUST_PORT is not a setting and is ignored",
    ]


@pytest.mark.parametrize(("name", "value"), [("device", "foo"), ("classes", "cat,dog,cat")])
def test_error_about_the_model_names_the_variable(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=rf"^ROBUST_{name.upper()}: expected .*(foo|cat)"):
        create_app(Settings(**{name: value}))  # type: ignore[arg-type]


def test_error_about_the_folder_of_jobs_names_the_variable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"^ROBUST_JOBS: .*file: expected a folder to write to"):
        create_app(Settings(jobs=tmp_path / "file"))


def test_error_about_the_comparison_model_names_the_variable(
    checkpoint: Path, tmp_path: Path
) -> None:
    settings = Settings(checkpoint=checkpoint, compare=str(tmp_path / "nope.pt"), device="cpu")
    service = create_app(settings).state.service
    with pytest.raises(ValueError, match=r"^ROBUST_COMPARE: .*nope.pt: expected a checkpoint"):
        service.load()


@pytest.mark.parametrize(
    "value",
    ["10.0.0.1/24", "10.0.0.0/33", "proxy.local", "127.0.0.1,*", "10.0.0.0/8, ::g"],
)
def test_invalid_proxies_are_rejected(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("ROBUST_TRUSTED_PROXIES", value)
    with pytest.raises(ServeError, match="ROBUST_TRUSTED_PROXIES: expected comma-separated addr"):
        read_settings()


@pytest.mark.parametrize("value", ["*", "10.0.0.0/8, 192.0.2.1,::1, fd00::/8"])
def test_valid_proxies_are_kept(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("ROBUST_TRUSTED_PROXIES", value)
    assert ",".join(Settings().trusted_proxies) == value.replace(" ", "")


def test_configuration_page_is_up_to_date() -> None:
    path = Path(__file__).parents[2] / "docs" / "configuration.md"
    assert path.read_text() == page(), "run python -m app.configuration > docs/configuration.md"


def test_square_at_its_defaults_passes_the_default_limits() -> None:
    square = resolve_attack("square", ThreatModel(eps=8 / 255))
    assert square.steps <= Settings().max_queries
    assert cost([square]) <= Settings().max_cost
