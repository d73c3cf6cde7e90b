"""The commands on a checkpoint, run in this process as `robust` runs them."""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from robust.checkpoint import load_checkpoint, save_checkpoint, sidecar_path
from robust.commands.evaluate import default_batch_size
from robust.commands.output import Progress, write_report
from robust.datasets import load_dataset
from robust.device import DeviceDisagrees
from robust.files import sha256_file
from robust.images import encode_png, to_float
from robust.matching import match_classes
from robust.prediction import predict
from robust.sidecar import DataRecord
from robust.threat_model import ThreatModel
from robust_cli import run
from tests.support.images import decode_png

Robust = Callable[..., str]


@pytest.fixture
def robust(checkpoint_path: Path, capsys: pytest.CaptureFixture[str]) -> Robust:
    """Run a command on the checkpoint and give back what it printed."""

    def call(command: str, *arguments: object) -> str:
        texts = [command, "--checkpoint", str(checkpoint_path), *map(str, arguments)]
        status = run(texts)
        output = capsys.readouterr()
        assert status == 0, output.err
        return output.out

    return call


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=generator)
    path = tmp_path / "photo.png"
    path.write_bytes(encode_png(pixels))
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    path = tmp_path / "set.npz"
    images = generator.integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
    np.savez(path, images=images, labels=np.arange(30) % 4)
    return path


def probabilities(checkpoint_path: Path, image: Path) -> Tensor:
    x = to_float(decode_png(image.read_bytes()))[None]
    return predict(load_checkpoint(checkpoint_path).classifier, x)[0]


# predict


def test_predict_prints_the_top_classes(robust: Robust, checkpoint_path: Path, photo: Path) -> None:
    expected = probabilities(checkpoint_path, photo)
    classes = load_checkpoint(checkpoint_path).sidecar.classes
    header, line = robust("predict", photo, "--top-k", 2).splitlines()
    assert header.split() == ["image", "top", "1", "top", "2"]
    first, second = expected.argsort(descending=True)[:2].tolist()
    assert line == (
        f"{photo}  {classes[first]} {100 * expected[first]:.1f}%  "
        f"{classes[second]} {100 * expected[second]:.1f}%"
    )


def test_predict_as_json(robust: Robust, checkpoint_path: Path, photo: Path) -> None:
    report = json.loads(robust("predict", photo, photo, "--json", "--top-k", 9))
    assert report["weights_sha256"] == sha256_file(checkpoint_path)
    one, other = report["predictions"]
    assert one == other
    assert one["image"] == str(photo)
    assert [item["index"] for item in one["top"]] == probabilities(checkpoint_path, photo).argsort(
        descending=True
    ).tolist()
    assert sum(item["probability"] for item in one["top"]) == pytest.approx(1, abs=1e-5)


def test_crop_and_resize_are_reported(
    checkpoint_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = load_checkpoint(checkpoint_path).classifier.architecture.input_size
    names = [tmp_path / name for name in ("a.bmp", "b.tif", "exact.png")]
    for name in names[:2]:
        Image.new("RGB", (64, 48), "gray").save(name)
    Image.new("RGB", (size, size), "gray").save(names[2])
    note = f"resized 1 image from 64x48 to {size}x{size}, cropped to the square in the center"
    command = ["--model", str(checkpoint_path), *map(str, names)]
    assert run(["predict", "--json", *command]) == 0
    output = capsys.readouterr()
    assert output.err == f"note: {names[0]} and 1 more, each: {note}\n"
    report = json.loads(output.out)["predictions"]
    assert [item["changes"] for item in report] == [[note], [note], []]
    command = ["attack", "--json", "-", "--attack", "fgsm", "--out", str(tmp_path), *command]
    assert run(command) == 0
    output = capsys.readouterr()
    assert output.err == f"note: {names[0]} and 1 more, each: {note}\n"
    report = json.loads(output.out)["images"]
    assert [item["changes"] for item in report] == [[note], [note], []]


def test_broken_image_is_named_and_the_others_are_predicted(
    checkpoint_path: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, absent = tmp_path / "broken.jpg", tmp_path / "absent.jpg"
    broken.write_bytes(photo.read_bytes()[:50])
    other = tmp_path / "other.png"
    other.write_bytes(photo.read_bytes())
    arguments = ["predict", "--model", str(checkpoint_path)]
    arguments += [str(photo), str(broken), str(absent), str(other)]
    assert run(arguments) == 1
    output = capsys.readouterr()
    assert [line.split()[0] for line in output.out.splitlines()[1:]] == [str(photo), str(other)]
    assert len(output.err.splitlines()) == 2
    assert f"in {broken}, found " in output.err
    assert f"robust: {absent}: no such file or directory\n" in output.err
    assert run([*arguments, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert [item["image"] for item in report["predictions"]] == [str(photo), str(other)]
    assert [item["image"] for item in report["broken"]] == [str(broken), str(absent)]


def test_folders_and_patterns(
    robust: Robust, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("b.png", "a.jfif", ".hidden"):
        (folder / name).write_bytes(photo.read_bytes())
    expected = [str(folder / "a.jfif"), str(folder / "b.png")]
    for argument in (folder, f"{folder}/*"):
        report = json.loads(robust("predict", argument, "--json"))
        assert [item["image"] for item in report["predictions"]] == expected
    assert run(["predict", f"{folder}/*.gif"]) == 2
    assert f"expected images in {folder}/*.gif, found none" in capsys.readouterr().err


def test_json_lists_the_guesses(
    checkpoint_path: Path,
    photo: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    bare = tmp_path / "bare.pt"
    torch.save({"model": torch.load(checkpoint_path, weights_only=True)}, bare)
    said = ["--classes", "a,b,c,d", "--mean", "cifar10"]
    assert run(["predict", "--model", str(bare), *said, "--json", str(photo)]) == 0
    model = json.loads(capsys.readouterr().out)["model"]
    assert model["architecture"]["mean"] == [0.4914, 0.4822, 0.4465]
    assert set(model["guessed"]) == {"arch", "stem", "activation", "input_size", "std"}
    assert "read from its entry 'model'" in model["notes"][0]
    assert f"{bare}: read off the keys: resnet18, stem imagenet; assumed: " in caplog.text


def test_disagreeing_device_is_reported_and_not_used(
    checkpoint_path: Path,
    photo: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def compare(classifier: object, device: torch.device, size: int) -> None:
        if device.type == "mps":
            raise DeviceDisagrees("mps disagrees with the CPU")

    monkeypatch.setattr("robust.device.resolve_device", lambda name: torch.device("mps"))
    monkeypatch.setattr("robust.checkpoint.compare_with_cpu", compare)
    command = ["predict", "--model", str(checkpoint_path), str(photo)]
    assert run(command) == 0
    assert "warning: mps disagrees with the CPU: using the CPU" in capsys.readouterr().err
    assert run([*command, "--device", "mps"]) == 2


def test_names_from_a_sidecar_cannot_reach_the_terminal(
    checkpoint_path: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "evil.pt"
    shutil.copy(checkpoint_path, copy)
    values = json.loads(checkpoint_path.with_suffix(".json").read_text())
    values["classes"] = ["\x1b[2Jcat", "dog\nfrog", "\x07", "d"]
    copy.with_suffix(".json").write_text(json.dumps(values))
    assert run(["predict", "--checkpoint", str(copy), str(photo), "--top-k", "4"]) == 0
    output = capsys.readouterr().out
    assert len(output.splitlines()) == 2
    assert "\x1b" not in output
    assert "\x07" not in output


def test_names_of_files_cannot_reach_the_terminal(
    robust: Robust, photo: Path, data: Path, tmp_path: Path
) -> None:
    named = shutil.copy(data, tmp_path / "my\x07set.npz")
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("one", "my\x07photo"):
        shutil.copy(photo, folder / f"{name}.png")
    options = ("--attack", "fgsm", "--eps", "1/255")
    for printed in (
        robust("evaluate", "--data", named, *options, "--curve", 0),
        robust("attack", folder, *options, "--out", tmp_path),
    ):
        assert "my " in printed
        assert "\x07" not in printed


# attack


def test_attack_reports_the_predictions_of_the_written_files(
    robust: Robust, checkpoint_path: Path, photo: Path, tmp_path: Path
) -> None:
    out, report_path = tmp_path / "out", tmp_path / "report.json"
    printed = robust("attack", photo, "--out", out, "--json", report_path, "--eps", "4/255")
    assert {item.name for item in out.iterdir()} == {
        "photo-input.png",
        "photo-fgsm.png",
        "photo-fgsm-perturbation.png",
        "photo-pgd-20.png",
        "photo-pgd-20-perturbation.png",
    }
    report = json.loads(report_path.read_text())
    assert report["weights_sha256"] == sha256_file(checkpoint_path)
    original = decode_png(photo.read_bytes())
    assert torch.equal(decode_png((out / "photo-input.png").read_bytes()), original)
    assert [item["attack"] for item in report["attacks"]] == ["fgsm", "pgd-20"]
    for item in report["attacks"]:
        path = Path(item["adversarial_image"])
        after = probabilities(checkpoint_path, path)
        assert item["after"]["index"] == int(after.argmax())
        assert item["after"]["probability"] == pytest.approx(float(after.max()), abs=2e-4)
        assert item["success"] == (item["after"]["index"] != item["before"]["index"])
        levels = decode_png(path.read_bytes()).double() - original.double()
        assert item["linf"] == levels.abs().max().item() / 255 <= 4 / 255
        assert item["l2"] == pytest.approx(levels.norm().item() / 255)
        assert item["eps_text"] == "4/255"
        perturbation = decode_png(Path(item["perturbation_image"]).read_bytes())
        assert torch.equal(perturbation == 128, levels == 0)
    header = printed.splitlines()[1]
    assert header.split() == [
        *("attack", "norm", "eps", "before", "after", "success", "linf", "l2", "seconds")
    ]
    assert re.search(r"^pgd-20 +linf +4/255 .* (yes|no) +4/255 ", printed, re.MULTILINE)


@pytest.mark.parametrize(("norm", "eps"), [("linf", "0.001"), ("l2", "0.9/255")])
def test_attack_refuses_an_eps_without_another_8_bit_image(
    checkpoint_path: Path,
    photo: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    norm: str,
    eps: str,
) -> None:
    out = tmp_path / "out"
    options = ("--checkpoint", str(checkpoint_path), "--out", str(out), "--norm", norm)
    assert run(["attack", str(photo), *options, "--eps", eps]) == 2
    reason = "expected eps of 0, or at least 1/255: no other 8-bit image is closer, got 0.00"
    assert reason in capsys.readouterr().err
    assert not out.exists()


def test_attack_of_a_folder(
    checkpoint_path: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(photo.read_bytes())
    (folder / "c.png").write_bytes(b"no image")
    out, path = tmp_path / "out", tmp_path / "report.json"
    arguments = ["attack", str(folder), "--model", str(checkpoint_path), "--attack", "fgsm"]
    assert run([*arguments, "--out", str(out), "--json", str(path)]) == 1
    output = capsys.readouterr()
    assert f"{folder / 'a.png'} untargeted, away from " in output.out
    assert f"in {folder / 'c.png'}, found" in output.err
    report = json.loads(path.read_text())
    assert [item["image"] for item in report["images"]] == [str(folder / f"{k}.png") for k in "ab"]
    assert report["broken"][0]["image"] == str(folder / "c.png")
    assert len(list(out.iterdir())) == 6
    (folder / "a.png").unlink()
    (folder / "b.png").unlink()
    assert run([*arguments, "--out", str(out), "--json", str(path)]) == 2
    report = json.loads(path.read_text())  # not the one of before
    assert (report["images"], len(report["broken"])) == ([], 1)
    assert run([*arguments, str(photo), str(tmp_path / "photo.jpg")]) == 2
    assert "expected images with different names" in capsys.readouterr().err


def test_attack_names_images_already_predicted_as_the_target(
    checkpoint_path: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first image is attacked, so the second must not end the command."""
    folder = tmp_path / "photos"
    folder.mkdir()
    taken = folder / "b.png"
    taken.write_bytes(photo.read_bytes())
    target = int(probabilities(checkpoint_path, taken).argmax())
    for seed in range(100):
        pixels = torch.randint(256, (3, 1, 1), generator=torch.Generator().manual_seed(seed))
        (folder / "a.png").write_bytes(encode_png(pixels.to(torch.uint8).expand(3, 32, 32)))
        if int(probabilities(checkpoint_path, folder / "a.png").argmax()) != target:
            break
    out, path = tmp_path / "out", tmp_path / "report.json"
    arguments = ["attack", str(folder), "--model", str(checkpoint_path), "--attack", "fgsm"]
    arguments += ["--target", str(target), "--out", str(out), "--json", str(path)]
    assert run(arguments) == 1
    name = load_checkpoint(checkpoint_path).sidecar.classes[target]
    why = f"{taken}: expected a target other than its prediction, got {name}"
    assert why in capsys.readouterr().err
    report = json.loads(path.read_text())
    assert [item["image"] for item in report["images"]] == [str(folder / "a.png")]
    assert report["broken"] == [{"image": str(taken), "error": why}]
    arguments[1] = str(taken)
    assert run(arguments) == 2
    assert json.loads(path.read_text())["images"] == []


def test_attack_with_every_option(robust: Robust, photo: Path, tmp_path: Path) -> None:
    report = json.loads(
        robust(
            *("attack", photo, "--attack", "pgd-3", "--norm", "l2", "--eps", "2", "--alpha", "0.5"),
            *("--restarts", 2, "--label", "dog", "--target", 3, "--seed", 5, "--out", tmp_path),
            *("--json", "-"),
        )
    )
    (item,) = report["attacks"]
    expected = {
        "attack": "pgd-3x2",
        "norm": "l2",
        "eps": 2.0,
        "alpha": 0.5,
        "steps": 3,
        "restarts": 2,
        "random_start": True,
        "seed": 5,
        "label": "dog",
        "target": "ship",
    }
    assert {key: item[key] for key in expected} == expected
    assert (tmp_path / "photo-pgd-3x2.png").exists()


def test_attack_on_a_misclassified_label_reports_already_wrong(
    robust: Robust, checkpoint_path: Path, photo: Path, tmp_path: Path
) -> None:
    last = int(probabilities(checkpoint_path, photo).argmin())
    printed = robust("attack", photo, "--label", last, "--attack", "fgsm", "--out", tmp_path)
    assert "already wrong" in printed


def test_same_attack_twice_is_done_once(robust: Robust, photo: Path, tmp_path: Path) -> None:
    arguments = ("--attack", "pgd", "--attack", "pgd-20", "--out", tmp_path, "--json", "-")
    assert len(json.loads(robust("attack", photo, *arguments))["attacks"]) == 1


# evaluate


def test_evaluate_reports(
    robust: Robust, checkpoint_path: Path, data: Path, tmp_path: Path
) -> None:
    path = tmp_path / "report.json"
    arguments = ("--attack", "fgsm", "--attack", "pgd-2", "--eps", "1/255", "--json", path)
    printed = robust("evaluate", "--data", data, *arguments, "--batch-size", 8)
    report = json.loads(path.read_text())
    model = load_checkpoint(checkpoint_path).classifier
    archive = np.load(data)
    x = to_float(torch.from_numpy(archive["images"]).permute(0, 3, 1, 2))
    correct = int((predict(model, x).argmax(1) == torch.from_numpy(archive["labels"])).sum())
    clean, fgsm, pgd = report["results"]
    assert (clean["correct"], clean["n"]) == (correct, 30)
    assert max(fgsm["correct"], pgd["correct"]) <= correct
    assert report["worst_case"]["correct"] <= min(fgsm["correct"], pgd["correct"])
    assert report["weights_sha256"] == sha256_file(checkpoint_path)
    assert (report["data"]["name"], report["data"]["count"]) == ("set.npz", 30)
    assert re.fullmatch("[0-9a-f]{64}", report["data"]["sha256"])
    assert report["versions"]["torch"] == torch.__version__
    assert report["device"].startswith(("cpu (", "NVIDIA"))
    assert report["seconds"] > 0
    lines = printed.splitlines()
    assert [line.split()[0] for line in lines[2:6]] == ["clean", "fgsm", "pgd-2", "worst"]
    assert re.search(rf"^clean +{100 * correct / 30:.2f} .* {correct}/30 ", printed, re.MULTILINE)
    assert "linf  1/255" in lines[3]


def test_evaluate_reports_changes_made_on_reading(
    checkpoint_path: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "large.npz"
    archive = np.load(data)
    large = np.kron(archive["images"], np.ones((1, 2, 2, 1), np.uint8))
    np.savez(path, images=large, labels=archive["labels"])
    arguments = ["--data", str(path), "--attack", "fgsm", "--curve", "0", "--json", "-"]
    assert run(["evaluate", "--checkpoint", str(checkpoint_path), *arguments]) == 0
    out, err = capfd.readouterr()
    report = json.loads(out)
    size = load_checkpoint(checkpoint_path).classifier.architecture.input_size
    given = f"{large.shape[2]}x{large.shape[1]}"
    resized = f"resized 30 images from {given} to {size}x{size}"
    assert report["data"]["changes"][0] == resized
    assert report["data"]["dtype"] == "uint8"
    assert f"note: large.npz: {resized}" in err


def test_evaluate_records_in_the_sidecar(checkpoint_path: Path, data: Path, tmp_path: Path) -> None:
    for path in (checkpoint_path, sidecar_path(checkpoint_path)):
        shutil.copy(path, tmp_path)
    copied = tmp_path / checkpoint_path.name
    arguments = ["--data", str(data), "--attack", "fgsm", "--json", str(tmp_path / "report.json")]
    assert run(["evaluate", "--checkpoint", str(copied), *arguments, "--record"]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    rows = load_checkpoint(copied).sidecar.evaluation[-2:]
    assert [row["attack"] for row in rows] == ["clean", "fgsm"]
    assert [row["correct"] for row in rows] == [row["correct"] for row in report["results"]]
    assert {(row["data"], row["data_sha256"], row["device"]) for row in rows} == {
        ("set.npz", report["data"]["sha256"], report["device"])
    }
    # Tables that fill pages stay out, reasons to doubt a number go with it.
    assert not {"confusion", "stages"} & {name for row in rows for name in row}
    flags = sorted(flag["name"] for flag in report["flags"])
    assert [row.get("flags", []) for row in rows] == [flags] * 2


def test_evaluate_shows_progress_in_plain_lines(
    checkpoint_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--checkpoint", str(checkpoint_path), "--data", str(data), "--curve", "10"]
    assert run(["evaluate", *arguments, "--batch-size", "2", "--attack", "pgd-2"]) == 0
    lines = capsys.readouterr().err.splitlines()
    shown = [line for line in lines if line.startswith("evaluate: ")]
    assert 2 <= len(shown) <= 10  # one for each tenth of the work
    assert shown[-1].startswith("evaluate: 100%, ")
    assert re.search(r"pgd-2 [0-9.]+% \([0-9.]+% to [0-9.]+%\)$", shown[-1])


def test_evaluate_reports_its_environment(robust: Robust, data: Path) -> None:
    arguments = ("--attack", "pgd-2", "--seed", 3, "--batch-size", 8, "--curve", 5)
    arguments += ("--precision", "fp32")
    report = json.loads(robust("evaluate", "--data", data, *arguments, "--json", "-"))
    assert (report["seed"], report["batch_size"], report["precision"]) == (3, 8, "fp32")
    assert report["precision_reason"] == "as requested"
    assert re.fullmatch("[0-9a-f]{64}", report["data"]["scored_sha256"])
    assert report["data"]["indices"] == "all"
    assert report["curve"][-1]["eps_text"] == "128/255"
    assert report["notes"] == []
    assert "chance" in {flag["name"] for flag in report["flags"]}
    assert all(flag.keys() == {"name", "text", "advice"} for flag in report["flags"])
    for item in report["results"]:
        assert [sum(row) for row in item["confusion"]] == [8, 8, 7, 7]
        assert item["seconds"] > 0
        assert item["forwards"] > 0
    assert report["results"][1]["seed"] == 3
    arguments = ("--attack", "fgsm", "--limit", 3, "--curve", 0)
    report = json.loads(robust("evaluate", "--data", data, *arguments, "--json", "-"))
    assert len(report["data"]["indices"]) == report["n"] == 3
    assert report["flags"] == []  # nothing is concluded from 3 images


@pytest.mark.parametrize(("size", "n"), [(32, 100), (64, 100), (224, 8), (1024, 1)])
def test_large_images_use_smaller_batches(size: int, n: int) -> None:
    assert default_batch_size(size) == n


@pytest.mark.parametrize("table_format", ["text", "markdown", "latex"])
def test_evaluate_formats_its_tables(robust: Robust, data: Path, table_format: str) -> None:
    arguments = ("--attack", "fgsm", "--attack", "pgd-2", "--curve", 5, "--format", table_format)
    lines = robust("evaluate", "--data", data, *arguments).splitlines()
    assert lines[0].endswith("on 30 of 30 images of set.npz")
    (clean,) = [line for line in lines if "clean" in line]
    if table_format == "latex":
        assert lines[1] == r"\begin{tabular}{lrrrrrr}"
        header = r"attack & norm & eps & accuracy \% & 95\% interval & correct & seconds \\"
        assert lines[3] == header
        assert re.fullmatch(r"clean & +& +& [0-9.]+ & .* & \d+/30 & [0-9.]+ \\\\", clean)
        assert lines.count(r"\end{tabular}") == 2
    elif table_format == "markdown":
        assert lines[1].startswith("| attack | norm | eps | accuracy % |")
        assert lines[2] == "| --- | --- | --- | --- | --- | --- | --- |"
        assert clean.count("|") == 8
    else:
        assert lines[1].split()[:3] == ["attack", "norm", "eps"]


def test_evaluate_warns_beside_the_table(
    checkpoint_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a network that was never trained there is something to say."""
    arguments = ["--checkpoint", str(checkpoint_path), "--data", str(data), "--curve", "0"]
    assert run(["evaluate", *arguments, "--attack", "apgd-t-2"]) == 0
    output = capsys.readouterr()
    assert "note: apgd-t: tries 3 target classes, not 9" in output.err
    (warning,) = [line for line in output.err.splitlines() if line.startswith("warning: ")]
    assert warning.startswith("warning: chance: ")
    assert "no more than by chance; check labels" in warning
    assert "warning" not in output.out


def test_default_threat_model_other_than_the_models_is_noted(
    checkpoint_path: Path,
    data: Path,
    photo: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    loaded = load_checkpoint(checkpoint_path)
    path = tmp_path / "model.pt"
    trained_for = ThreatModel(norm="l2", eps=0.25)
    save_checkpoint(path, loaded.classifier, replace(loaded.sidecar, threat_model=trained_for))
    note = "note: the model was trained for l2 0.25, and is attacked under linf 8/255; "
    evaluate = ["evaluate", "--data", str(data), "--limit", "4", "--curve", "0"]
    attack = ["attack", str(photo), "--out", str(tmp_path)]
    for command in (evaluate, attack):
        arguments = [*command, "--model", str(path), "--attack", "fgsm"]
        for more, noted in (([], 1), (["--eps", "8/255"], 0), (["--norm", "linf"], 0)):
            assert run([*arguments, *more]) == 0
            assert capsys.readouterr().err.count(note) == noted


def test_evaluate_warns_of_images_trained_on(
    checkpoint_path: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = load_checkpoint(checkpoint_path)
    trained_on = DataRecord(name="set", count=30, sha256=load_dataset(data).sha256)
    path = tmp_path / "model.pt"
    save_checkpoint(path, loaded.classifier, replace(loaded.sidecar, data=trained_on))
    arguments = ["--data", str(data), "--attack", "fgsm", "--curve", "0", "--record"]
    assert run(["evaluate", "--checkpoint", str(path), *arguments]) == 0
    assert "warning: training-data: these are the images that" in capsys.readouterr().err
    rows = load_checkpoint(path).sidecar.evaluation
    assert all("training-data" in row["flags"] for row in rows[-2:])
    assert run(["evaluate", "--checkpoint", str(path), *arguments, "--limit", "20"]) == 0
    assert "warning: training-data" in capsys.readouterr().err


def test_evaluate_prints_results_even_if_they_cannot_be_written(
    checkpoint_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not the folder's mode, which says nothing to root."""
    arguments = ["--checkpoint", str(checkpoint_path), "--data", str(data)]
    assert run(["evaluate", *arguments, "--json", str(data / "report.json")]) == 2
    output = capsys.readouterr()
    assert re.search(r"^clean .* [0-9]+/30 ", output.out, re.MULTILINE)
    assert output.err.splitlines()[-1].startswith("robust: ")


@pytest.mark.parametrize("model", ["bare.pt", "own.py:make"])
def test_evaluate_rejects_record_without_a_sidecar_before_starting(
    model: str,
    checkpoint_path: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copy(checkpoint_path, tmp_path / "bare.pt")
    (tmp_path / "own.py").write_text(
        "import torch\n\ndef make():\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10))\n"
    )
    arguments = ["--model", str(tmp_path / model), "--data", str(data), "--record"]
    assert run(["evaluate", *arguments]) == 2
    output = capsys.readouterr()
    assert not output.out
    assert "expected a checkpoint with a sidecar to add results to, found none" in output.err


def test_missing_default_model_error_names_the_option(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["evaluate", "--data", str(data)]) == 2
    found = "expected --model, as this folder has no models/robust_model.pt"
    assert found in " ".join(capsys.readouterr().err.split())


def test_json_output_never_replaces_a_sidecar(
    checkpoint_path: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (checkpoint_path, sidecar_path(checkpoint_path)):
        shutil.copy(path, tmp_path)
    copied = tmp_path / checkpoint_path.name
    sidecar = sidecar_path(copied)
    before = sidecar.read_bytes()
    arguments = ["evaluate", "--model", str(copied), "--data", str(data), "--json", str(sidecar)]
    assert run(arguments) == 2
    assert sidecar.read_bytes() == before
    assert "a model's sidecar" in capsys.readouterr().err


def test_evaluate_resumes_from_its_journal(
    checkpoint_path: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, ticks = tmp_path / "set.journal", 0
    arguments = ["evaluate", "--checkpoint", str(checkpoint_path), "--data", str(data)]
    arguments += ["--attack", "pgd-3", "--eps", "0.5/255", "--curve", "0", "--batch-size", "5"]

    def interrupt(self: Progress) -> None:
        nonlocal ticks
        ticks += path.exists()
        if ticks == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "tick", interrupt)
        assert run([*arguments, "--journal", str(path)]) == 130
        error = capsys.readouterr().err
        assert error.endswith(f"stopped: the same command resumes from {path}\n")
    kept = path.stat().st_size
    assert kept > 0
    assert not list(tmp_path.glob("set.journal-*"))
    results = []
    for extra in (["--journal", str(path)], []):
        capsys.readouterr()
        assert run([*arguments, *extra, "--json", "-"]) == 0
        results.append(json.loads(capsys.readouterr().out)["results"])
    for one, other in zip(*results, strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    other_seed = [*arguments, "--journal", str(path), "--seed", "1"]
    assert run(other_seed) == 2
    error = capsys.readouterr().err
    assert "expected a journal of the same evaluation, but its seed of pgd is 0, not 1; " in error


def test_evaluate_refuses_the_journal_of_another_normalization(
    checkpoint_path: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "theirs.pt"  # without a sidecar, which settles the normalization
    shutil.copy(checkpoint_path, bare)
    arguments = ["evaluate", "--model", str(bare), "--data", str(data), "--attack", "fgsm"]
    arguments += ["--curve", "0", "--journal", str(tmp_path / "set.journal")]
    assert run(arguments) == 0
    assert run([*arguments, "--mean", "0.5,0.5,0.5"]) == 2
    error = capsys.readouterr().err
    assert "but its mean is [0.0, 0.0, 0.0], not [0.5, 0.5, 0.5]; give another file" in error


def test_evaluate_matches_class_names(
    robust: Robust, checkpoint_path: Path, data: Path, tmp_path: Path
) -> None:
    """A folder sorted by name scores as the same images do by label."""
    from robust.datasets import load_dataset

    images = load_dataset(data).images
    model = load_checkpoint(checkpoint_path).classifier
    names = ("ship", "cat", "dog", "frog")
    for index, image in enumerate(images):
        folder = tmp_path / "folder" / names[index % 4]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index:03}.png").write_bytes(encode_png(image))
    report = json.loads(
        robust("evaluate", "--data", tmp_path / "folder", "--attack", "fgsm", "--json", "-")
    )
    truth = torch.tensor([(3, 0, 1, 2)[index % 4] for index in range(30)])
    correct = int((predict(model, to_float(images)).argmax(1) == truth).sum())
    assert report["results"][0]["correct"] == correct
    assert report["classes"] == ["cat", "dog", "frog", "ship"]
    dataset = load_dataset(tmp_path / "folder")
    assert sorted(dataset.classes) == list(dataset.classes)
    assert match_classes(dataset, report["classes"]).class_counts() == (8, 7, 7, 8)


def test_report_to_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_report(pipe, {"a": 1})
        assert json.loads(os.read(reading, 100)) == {"a": 1}
    finally:
        os.close(reading)
    assert not pipe.is_file()


def test_progress_is_a_bar_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress = Progress(100, title="evaluate", unit="images")
    try:
        progress.update(50, "clean 30.0%")
        progress.bar.refresh()
    finally:
        progress.close()
    shown = capsys.readouterr().err
    assert "evaluate:  50%" in shown
    assert "50/100" in shown
    assert "clean 30.0%" in shown
    assert "\n" not in shown  # the bar is taken off again


# export


@pytest.mark.parametrize(("kind", "suffix"), [("torchvision", "bin"), ("safetensors",) * 2])
def test_export_prints_how_to_load(robust: Robust, tmp_path: Path, kind: str, suffix: str) -> None:
    path = tmp_path / f"model.{suffix}"
    printed = robust("export", "--format", kind, "--out", path)
    first, second = printed.splitlines()
    assert first == f"wrote {path}; load it with:"
    assert "torchvision.models.resnet18(num_classes=4)" in second
    assert path.stat().st_size > 40_000_000
