"""POST /attack with `compare`: two models, each attacked, with transfer to the other."""

import base64
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from app.engine.compare import load_compare
from app.engine.served_model import load_model
from app.settings import Settings
from robust.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from robust.client import Client
from tests.app.conftest import write_checkpoint
from tests.support.onnx_file import write_onnx
from tests.support.serving import CLASSES, Running, png, serving, until

QUERY = "attack=fgsm&attack=pgd&steps=3"
PNG = base64.b64encode(png(1)).decode()
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with one to compare with beside it."""
    folder = tmp_path_factory.mktemp("compared")
    write_checkpoint(folder / "robust_model.pt", seed=1)
    write_checkpoint(folder / "plain_model.pt", seed=2)
    return folder


def settings(folder: Path, **given: Any) -> Settings:
    return Settings(checkpoint=folder / "robust_model.pt", threads=1, device="cpu", **given)


@pytest.fixture(scope="module")
def compared(folder: Path) -> Iterator[Running]:
    with serving(settings(folder)) as running:
        yield running


@pytest.fixture(scope="module")
def other_served(folder: Path) -> Iterator[Running]:
    """The two models the other way round, the one to compare with by its path."""
    robust, plain = folder / "robust_model.pt", folder / "plain_model.pt"
    given = Settings(checkpoint=plain, compare=str(robust), threads=1, device="cpu")
    with serving(given) as running:
        yield running


def attack(running: Running, query: str) -> dict[str, Any]:
    response = running.client.post(f"/attack?{query}", content=png(1))
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def judged(running: Running, result: dict[str, Any]) -> Any:
    body = base64.b64decode(result["adversarial_png"])
    return running.client.post("/predict", content=body).json()["results"][0]


def without_times(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [item | {"seconds": 0, "transfer": None} for item in results]


@pytest.mark.parametrize("more", ["", "&label=frog", "&target=dog&eps=32/255"])
def test_both_models_are_attacked_as_if_alone_and_transfer_is_reported(
    compared: Running, other_served: Running, more: str
) -> None:
    query = QUERY.replace("attack=fgsm&", "") + more if "target" in more else QUERY + more
    both = attack(compared, f"{query}&compare=true")
    alone, other = attack(compared, query), attack(other_served, query)
    compare = both["compare"]
    for answer, single in ((both, alone), (compare, other)):
        assert answer["model_sha256"] == single["model_sha256"]
        assert without_times(answer["results"]) == without_times(single["results"])
        for name in ("label", "already_wrong"):
            assert answer[name] == single[name]
        before, alone_before = answer["before"], single["before"]
        assert before["index"] == alone_before["index"]
        assert before["probability"] == pytest.approx(alone_before["probability"], abs=2e-4)
    assert alone["compare"] is None
    assert compare["model"] == "plain_model.pt"
    for results, judge, answer in (
        (compare["results"], compared, both),
        (both["results"], other_served, compare),
    ):
        for result in results:
            transfer, seen = result["transfer"], judged(judge, result)
            assert transfer["after"]["index"] == seen["index"]
            assert transfer["after"]["probability"] == pytest.approx(seen["probability"], abs=1e-4)
            wanted = both["target"]
            if wanted:
                led, before = (
                    seen["index"] == wanted["index"],
                    answer["before"]["index"] == wanted["index"],
                )
            else:
                led, before = seen["index"] != answer["label"]["index"], answer["already_wrong"]
            expected = "already_wrong" if before else "broken" if led else "withstood"
            assert transfer["outcome"] == expected


def test_model_that_predicts_the_target_already_does_not_fail_the_other(
    compared: Running, other_served: Running
) -> None:
    seen = [judged(running, {"adversarial_png": PNG}) for running in (compared, other_served)]
    assert seen[0]["index"] != seen[1]["index"]
    for place in (0, 1):
        query = f"attack=pgd-3&target={seen[place]['index']}&compare=true"
        answer = attack(compared, query)
        (own,), (other,) = answer["results"], answer["compare"]["results"]
        reached, moved = (own, other) if place == 0 else (other, own)
        assert (reached["outcome"], reached["success"]) == ("already_wrong", False)
        assert reached["linf"] == reached["l2"] == 0
        sides = (answer, answer["compare"])
        assert [side["already_wrong"] for side in sides] == [place == 0, place == 1]
        assert reached["adversarial_png"] == answer["input_png"]
        assert reached["after"]["index"] == seen[place]["index"]
        assert reached["transfer"]["after"]["index"] == seen[1 - place]["index"]
        assert moved["outcome"] != "already_wrong"
        assert moved["linf"] > 0
        # A label that the client gives is checked.
        given = compared.client.post(
            f"/attack?{query}&label={seen[place]['index']}", content=png(1)
        )
        assert given.status_code == 422
        assert given.json()["errors"][0]["got"] == "the label itself"


def test_compare_only_attacks_just_the_comparison_model(compared: Running) -> None:
    both = attack(compared, f"{QUERY}&compare=true")
    only = attack(compared, f"{QUERY}&compare=only")
    assert only["results"] == []
    assert without_times(only["compare"]["results"]) == without_times(both["compare"]["results"])
    for name in ("label", "already_wrong", "input_png", "model_sha256"):
        assert only[name] == both[name]
    assert only["before"]["index"] == both["before"]["index"]


def test_precision_of_predictions_is_not_logged_for_the_comparison_model(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "app"), serving(settings(folder)):
        pass
    lines = [record.getMessage() for record in caplog.records]
    (served,) = [line for line in lines if line.startswith("robust_model.pt: ")]
    (compare,) = [line for line in lines if line.startswith("plain_model.pt: ")]
    assert served.startswith("robust_model.pt: predictions in fp32 (")
    assert compare.startswith("plain_model.pt: attacks search in fp32 (")
    assert "prediction" not in compare


def test_comparison_model_without_gradients(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "robust_model.pt", classes=tuple("0123456789"))
    write_onnx(tmp_path / "theirs.onnx")
    given = settings(tmp_path, compare=str(tmp_path / "theirs.onnx"))
    with serving(given) as running:
        for compare in ("true", "only"):
            response = running.client.post(f"/attack?{QUERY}&compare={compare}", content=png(1))
            assert response.status_code == 422
            (error,) = response.json()["errors"]
            assert (error["field"], error["got"]) == ("attack", "fgsm, pgd")
        only = attack(running, "attack=square&steps=5&compare=only")
        assert [result["parameters"]["steps"] for result in only["compare"]["results"]] == [5]


def test_model_card_names_both_models(compared: Running, running: Running) -> None:
    card = compared.client.get("/model").json()
    assert (card["name"], card["compare"]["name"]) == ("robust_model.pt", "plain_model.pt")
    assert card["compare"]["sha256"] != card["sha256"]
    assert card["compare"]["card"]["architecture"]["arch"] == "wide_resnet10_1"
    assert running.client.get("/model").json()["compare"] is None


def test_compare_without_a_comparison_model_is_422(running: Running) -> None:
    for compare in ("true", "only"):
        response = running.client.post(f"/attack?attack=fgsm&compare={compare}", content=png())
        assert response.status_code == 422
        (error,) = response.json()["errors"]
        assert error["field"] == "compare"
        assert "ROBUST_COMPARE" in error["expected"]
    assert running.client.post("/attack?compare=false", content=png()).status_code == 200


@pytest.mark.parametrize(
    ("query", "field"), [("compare=perhaps", "compare"), ("compare=true&compare=only", "compare")]
)
def test_compare_rejects_unknown_and_repeated_values(
    compared: Running, query: str, field: str
) -> None:
    response = compared.client.post(f"/attack?attack=fgsm&{query}", content=png())
    assert response.status_code == 422
    assert response.json()["errors"][0]["field"] == field


def test_compare_may_be_true_in_json(compared: Running) -> None:
    body = {"image": base64.b64encode(png()).decode(), "attack": "fgsm", "compare": True}
    assert compared.client.post("/attack", json=body).json()["compare"]["results"]


def test_compare_is_rejected_with_accept_png(compared: Running) -> None:
    response = compared.client.post(
        "/attack?attack=fgsm&compare=true", content=png(), headers={"Accept": "image/png"}
    )
    assert response.status_code == 422
    assert response.json()["errors"][0]["field"] == "compare"


def test_queue_limit_counts_both_models(folder: Path) -> None:
    with serving(settings(folder, queue_limit=100, client_share=0.5)) as running:

        def status(query: str) -> int:
            return running.client.post(f"/attack?attack=pgd&{query}", content=png()).status_code

        assert status("steps=20") == 200  # 43 passes of the 50
        assert status("steps=20&compare=true") == 422
        assert status("steps=20&compare=only") == 200  # 45
        assert status("steps=9&compare=true") == 200  # 46


def test_client_returns_both_models_results(compared: Running) -> None:
    with Client(compared.url) as client:
        (attacked,) = client.attack(png(1), "fgsm", compare=True)
        (alone,) = client.attack(png(1), "fgsm")
    answer = attack(compared, "attack=fgsm&compare=true")
    assert attacked.image == alone.image
    assert alone.compare is alone.transfer is None
    assert attacked.compare is not None
    assert attacked.compare.transfer is not None
    (other,) = answer["compare"]["results"]
    assert attacked.compare.image == base64.b64decode(other["adversarial_png"])
    assert attacked.compare.before.label == answer["compare"]["before"]["label"]
    assert attacked.compare.transfer.outcome == other["transfer"]["outcome"]


def test_reloaded_checkpoint_is_compared_from_the_next_request(tmp_path: Path) -> None:
    path = tmp_path / "robust_model.pt"
    first = write_checkpoint(path, seed=1)
    plain = write_checkpoint(tmp_path / "plain_model.pt", seed=2)
    with serving(settings(tmp_path, reload_seconds=0.05)) as running:
        assert attack(running, "attack=fgsm&compare=true")["model_sha256"] == first
        second = write_checkpoint(path, seed=3)
        until(lambda: running.service.models.sha256 == second)
        answer = attack(running, "attack=fgsm&compare=true")
        assert answer["model_sha256"] == second
        assert answer["compare"]["model_sha256"] == plain
        # One of other classes is served, and compared with nothing.
        loaded = load_checkpoint(path)
        sidecar = replace(loaded.sidecar, classes=CLASSES[::-1])
        save_checkpoint(path, loaded.classifier, sidecar)
        until(lambda: running.client.get("/model").json()["classes"][0] == "truck")
        assert running.client.get("/model").json()["compare"] is None
        response = running.client.post("/attack?compare=true", content=png())
        assert response.status_code == 422


def test_incompatible_comparison_model_fails_startup(folder: Path, tmp_path: Path) -> None:
    loaded = load_checkpoint(folder / "plain_model.pt")
    other = tmp_path / "other.pt"
    save_checkpoint(other, loaded.classifier, replace(loaded.sidecar, classes=CLASSES[::-1]))
    served = load_model(folder / "robust_model.pt", CPU, attacks_only=True)
    with pytest.raises(
        CheckpointError, match=r"other.pt.*found the classes truck.*instead of airplane"
    ):
        load_compare(other, CPU, served=served, required=True)
    with pytest.raises(CheckpointError, match=r"absent.pt: expected a checkpoint, found no such"):
        load_compare(tmp_path / "absent.pt", CPU, served=served, required=True)


def test_unusable_default_comparison_file_is_skipped(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    served = load_model(folder / "robust_model.pt", CPU, attacks_only=True)
    (tmp_path / "plain_model.pt").write_bytes(b"no weights")
    found = load_compare(tmp_path / "plain_model.pt", CPU, served=served, required=False)
    assert found is None
    assert "without a comparison model" in caplog.text
