import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from robust import files
from robust.checkpoint import load_checkpoint, save_checkpoint
from robust.classifier import Architecture, Classifier
from robust.datasets import Dataset
from robust.sidecar import Sidecar
from robust.threat_model import ThreatModel
from tests.support.waiting import until
from training import context
from training import step as step_module
from training.context import Run
from training.monitor import Progress
from training.recipe import AdversarialPart, Phase, Recipe
from training.recipes import named_recipe
from training.run import Stopped, train
from training.state import RunFolder, TrainingError, load_state

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny: Recipe, colors: Dataset) -> Path:
    """The checkpoint of a run that was never stopped."""
    out = tmp_path_factory.mktemp("finished") / "model.pt"
    train(tiny, colors, out=out, device=CPU)
    return out


def stop_after(count: int):  # type: ignore[no-untyped-def]
    calls = iter(range(1, count + 1))
    return lambda: next(calls, count) >= count


def test_a_run_writes_a_checkpoint_with_its_whole_record(
    finished: Path, tiny: Recipe, colors: Dataset
) -> None:
    checkpoint = load_checkpoint(finished)
    sidecar = checkpoint.sidecar
    assert sidecar.classes == colors.classes
    assert sidecar.recipe["name"] == "tiny"
    assert sidecar.data is not None
    assert (sidecar.data.name, sidecar.data.count) == ("colors", 80)
    assert sidecar.data.sha256 == colors.sha256
    assert sidecar.seed == 0
    assert {row["attack"] for row in sidecar.evaluation} == {"clean", "fgsm", "pgd-20"}
    assert all(row["n"] == 16 for row in sidecar.evaluation)
    assert torch.load(finished, weights_only=True)["fc.weight"].dtype == torch.float16
    assert sidecar.recipe["kept_epoch"] in (2, 3)  # never one of the clean phase


def test_a_run_keeps_its_metrics_beside_the_checkpoint(finished: Path) -> None:
    folder = RunFolder.of(finished)
    rows = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert [row["phase"] for row in rows] == ["clean", "adversarial", "adversarial"]
    assert all(0 <= row["pgd"] <= row["clean"] <= 1 for row in rows)
    assert json.loads(folder.manifest.read_text())["recipe"]["name"] == "tiny"
    assert list(folder.tensorboard.glob("events.*"))
    assert not folder.state.exists()


@pytest.mark.parametrize("steps", [1, 4, 6, 11])  # in each phase, and at the end of an epoch
def test_a_resumed_run_ends_bit_equal(
    steps: int,
    finished: Path,
    tiny: Recipe,
    colors: Dataset,
    out: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    with pytest.raises(Stopped):
        train(tiny, colors, out=out, device=CPU, should_stop=stop_after(steps), resume=True)
    assert "nothing to resume; the run starts from the beginning" in caplog.text
    caplog.clear()
    assert not out.exists()
    train(tiny, colors, out=out, device=CPU, resume=True)
    assert "nothing to resume" not in caplog.text
    assert out.read_bytes() == finished.read_bytes()
    mine, theirs = (RunFolder.of(path).metrics.read_text() for path in (out, finished))
    timings = ("seconds", "scoring_seconds", "images_per_second")

    def numbers(text: str) -> list[dict[str, object]]:
        rows = [json.loads(line) for line in text.splitlines()]
        return [{k: v for k, v in row.items() if k not in timings} for row in rows]

    assert numbers(mine) == numbers(theirs)


def test_a_run_killed_outright_resumes_bit_equal(
    finished: Path, tiny: Recipe, colors: Dataset, out: Path
) -> None:
    script = (
        "import signal, sys, time, torch\n"
        "from pathlib import Path\n"
        "from tests.support.small import colors, tiny\n"
        "from training.run import train\n"
        "from training.state import RunFolder\n"
        "torch.set_num_threads(int(sys.argv[2]))\n"
        "out = Path(sys.argv[1])\n"
        "def stop(p):\n"
        "    if (p.epoch, p.step) == (2, 2):  # inside the second epoch\n"
        "        while not RunFolder.of(out).state.exists():  # written in the background\n"
        "            time.sleep(0.01)\n"
        "        print('here', flush=True)\n"
        "        signal.pause()\n"
        "train(tiny(), colors(), out=out, device=torch.device('cpu'), observe=stop)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, out, str(torch.get_num_threads())],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "here\n"
        with pytest.raises(TrainingError, match="another training run"), RunFolder.of(out).locked():
            pass
    finally:
        process.kill()
        process.stdout.close()
    assert process.wait() == -signal.SIGKILL  # which releases the lock
    assert RunFolder.of(out).state.exists()
    train(tiny, colors, out=out, device=CPU, resume=True)
    assert out.read_bytes() == finished.read_bytes()


def test_second_run_on_the_same_output_is_rejected(
    tiny: Recipe, colors: Dataset, out: Path
) -> None:
    with RunFolder.of(out).locked(), pytest.raises(TrainingError, match="another training run"):
        train(tiny, colors, out=out, device=CPU)


def test_an_unfinished_run_is_not_overwritten(tiny: Recipe, colors: Dataset, out: Path) -> None:
    with pytest.raises(Stopped):
        train(tiny, colors, out=out, device=CPU, should_stop=lambda: True)
    with pytest.raises(TrainingError, match="unfinished run; continue it with --resume"):
        train(tiny, colors, out=out, device=CPU)
    assert RunFolder.of(out).state.exists()


def test_run_starts_from_the_given_weights(
    tiny: Recipe, colors: Dataset, out: Path, finished: Path
) -> None:
    """At a rate of nearly nothing, without averaging, it ends with them."""
    frozen = replace(
        tiny, ema_decay=0, phases=(replace(tiny.phases[1], epochs=1, learning_rate=1e-30),)
    )
    sidecar = train(frozen, colors, out=out, device=CPU, init=load_checkpoint(finished))
    assert sidecar.recipe["init"] == load_checkpoint(finished).sha256
    before, after = (torch.load(path, weights_only=True) for path in (finished, out))
    assert all(
        torch.equal(before[key], after[key])
        for key in before
        if "running" not in key and "tracked" not in key
    )


def test_other_classes_get_a_new_head(
    tiny: Recipe, colors: Dataset, out: Path, finished: Path
) -> None:
    others = replace(colors, classes=("a", "b", "c", "d"))
    frozen = replace(
        tiny, ema_decay=0, phases=(replace(tiny.phases[1], epochs=1, learning_rate=1e-30),)
    )
    train(frozen, others, out=out, device=CPU, init=load_checkpoint(finished))
    before, after = (torch.load(path, weights_only=True) for path in (finished, out))
    assert torch.equal(before["block1.layer.0.conv2.weight"], after["block1.layer.0.conv2.weight"])
    assert not torch.equal(before["fc.weight"], after["fc.weight"])


def test_initial_weights_of_another_architecture_are_rejected(
    tiny: Recipe, colors: Dataset, out: Path, finished: Path
) -> None:
    other = replace(tiny, arch="wide_resnet16_1")
    with pytest.raises(
        TrainingError,
        match="arch wide_resnet16_1, found arch wide_resnet10_1; change the recipe with --set",
    ):
        train(other, colors, out=out, device=CPU, init=load_checkpoint(finished))


def test_different_held_out_images_than_the_initial_run_give_a_warning(
    tiny: Recipe, colors: Dataset, out: Path, finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    init = load_checkpoint(finished)
    for seed in (0, 1):
        caplog.clear()
        with pytest.raises(Stopped):
            train(
                tiny,
                colors,
                out=out.with_name(f"{seed}.pt"),
                device=CPU,
                seed=seed,
                init=init,
                should_stop=lambda: True,
            )
        assert ("with --seed 0 the same images are held out" in caplog.text) is (seed == 1)


def test_run_from_before_a_field_existed_is_resumed(
    tiny: Recipe, colors: Dataset, out: Path, finished: Path
) -> None:
    with pytest.raises(Stopped):
        train(tiny, colors, out=out, device=CPU, should_stop=stop_after(4))
    manifest = RunFolder.of(out).manifest
    record = files.read_json(manifest)
    del record["recipe"]["class_weights"], record["recipe"]["phases"][0]["teacher"]
    files.write_json(manifest, record)
    train(tiny, colors, out=out, device=CPU, resume=True)
    assert out.read_bytes() == finished.read_bytes()


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        ("recipe", "clean.learning_rate .* instead of 0.75"),
        ("seed", "0 instead of 1"),
        ("data", "count 80 instead of 79"),
        ("init", "None instead of '[0-9a-f]"),
    ],
)
def test_resuming_something_else_is_refused(
    changed: str, difference: str, tiny: Recipe, colors: Dataset, out: Path, finished: Path
) -> None:
    with pytest.raises(Stopped):
        train(tiny, colors, out=out, device=CPU, should_stop=lambda: True)
    clean, *others = tiny.phases
    phases = (replace(clean, learning_rate=0.75), *others)
    recipe = replace(tiny, phases=phases) if changed == "recipe" else tiny
    data = colors.subset(range(79)) if changed == "data" else colors
    init = load_checkpoint(finished) if changed == "init" else None
    with pytest.raises(TrainingError, match=f"found another {changed}: {difference}"):
        train(
            recipe,
            data,
            out=out,
            device=CPU,
            seed=int(changed == "seed"),
            init=init,
            resume=True,
        )


def test_resuming_a_finished_run_changes_nothing(
    tiny: Recipe, colors: Dataset, tmp_path: Path, finished: Path
) -> None:
    before = finished.read_bytes()
    sidecar = train(tiny, colors, out=finished, device=CPU, resume=True)
    assert finished.read_bytes() == before
    assert sidecar == load_checkpoint(finished).sidecar


def test_run_that_replaces_its_initial_weights_can_be_resumed(
    tiny: Recipe, colors: Dataset, tmp_path: Path, finished: Path
) -> None:
    """`--init model.pt --out model.pt`: once that is written, init is no longer what it was."""
    out = tmp_path / "model.pt"
    for path in (finished, finished.with_suffix(".json")):
        shutil.copy(path, tmp_path)
    first = load_checkpoint(out).sha256
    folder = RunFolder.of(out)
    states: list[bytes] = []

    def keep_state(progress: Progress) -> None:
        if progress.epoch >= 2:  # the state after the first epoch is written in the background
            until(folder.state.exists)
            states.append(folder.state.read_bytes())

    train(tiny, colors, out=out, device=CPU, init=load_checkpoint(out), observe=keep_state)
    written = out.read_bytes()
    again = train(tiny, colors, out=out, device=CPU, init=load_checkpoint(out), resume=True)
    assert again.recipe["init"] == first
    assert out.read_bytes() == written

    # Killed after the checkpoint was written, and before the run was said to be finished.
    manifest = files.read_json(folder.manifest)
    del manifest["finished"]
    files.write_json(folder.manifest, manifest)
    folder.state.write_bytes(states[-1])
    again = train(tiny, colors, out=out, device=CPU, init=load_checkpoint(out), resume=True)
    assert again.recipe["init"] == first
    assert out.read_bytes() == written
    assert files.read_json(folder.manifest)["finished"]


def test_files_of_a_finished_run_are_moved_aside(
    tiny: Recipe, colors: Dataset, tmp_path: Path, finished: Path
) -> None:
    out = tmp_path / "model.pt"
    shutil.copytree(finished.parent, tmp_path, dirs_exist_ok=True)
    folder, before = RunFolder.of(out), RunFolder.of(finished)
    for number in (1, 2):
        with pytest.raises(Stopped):
            train(tiny, colors, out=out, device=CPU, seed=number, should_stop=lambda: True)
        folder.state.unlink()
    assert not folder.metrics.read_text()
    aside = folder.path.with_name("model.1")
    assert (aside / "model.pt").read_bytes() == out.read_bytes() == finished.read_bytes()
    assert (aside / "model.json").read_bytes() == finished.with_suffix(".json").read_bytes()
    assert (aside / "metrics.jsonl").read_bytes() == before.metrics.read_bytes()
    assert (aside / "run.json").read_bytes() == before.manifest.read_bytes()
    assert list((aside / "tensorboard").iterdir())
    assert not folder.path.with_name("model.2").exists()  # the second found nothing to keep


def test_replaced_checkpoint_is_kept_whatever_its_origin(
    tiny: Recipe, colors: Dataset, out: Path, finished: Path
) -> None:
    for path in (finished, finished.with_suffix(".json")):
        shutil.copy(path, out.with_name(out.stem + path.suffix))
    train(tiny, colors, out=out, device=CPU, seed=5)
    kept = RunFolder.of(out).path.with_name(f"{out.stem}.1")
    assert (kept / out.name).read_bytes() == finished.read_bytes() != out.read_bytes()
    assert load_checkpoint(kept / out.name).sidecar == load_checkpoint(finished).sidecar


def test_temporary_file_of_a_killed_writer_is_removed(
    tiny: Recipe, colors: Dataset, out: Path, finished: Path
) -> None:
    folder = RunFolder.of(out).path
    folder.mkdir(parents=True)
    (folder / ".state.pt.abc.tmp").write_bytes(b"half a state")
    with pytest.raises(Stopped):
        train(tiny, colors, out=out, device=CPU, should_stop=lambda: True)
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("resume", [False, True])
def test_a_damaged_record_is_named(
    tiny: Recipe, colors: Dataset, out: Path, *, resume: bool
) -> None:
    folder = RunFolder.of(out)
    folder.path.mkdir(parents=True)
    folder.manifest.write_text('{"recipe')
    with pytest.raises(TrainingError, match=r"run\.json: expected the record of a run"):
        train(tiny, colors, out=out, device=CPU, resume=resume)


def test_unrelated_state_file_is_not_resumed(tiny: Recipe, colors: Dataset, out: Path) -> None:
    with pytest.raises(Stopped):
        train(tiny, colors, out=out, device=CPU, should_stop=lambda: True)
    RunFolder.of(out).manifest.unlink()
    with pytest.raises(TrainingError, match=r"expected run\.json of the same run"):
        train(tiny, colors, out=out, device=CPU, resume=True)


def test_closed_progress_pipe_does_not_fail_the_run(
    tiny: Recipe, colors: Dataset, out: Path
) -> None:
    def closed(progress: Progress) -> None:
        raise BrokenPipeError(errno.EPIPE, "broken pipe")

    with pytest.raises(BrokenPipeError):
        train(tiny, colors, out=out, device=CPU, observe=closed)


def test_images_of_another_size_are_rejected(tiny: Recipe, colors: Dataset, out: Path) -> None:
    other = replace(colors, images=F.interpolate(colors.images, scale_factor=2))
    with pytest.raises(TrainingError, match="colors: expected images of 16 x 16 pixels"):
        train(tiny, other, out=out, device=CPU)
    assert not out.exists()


def test_images_that_score_an_epoch_are_not_only_of_the_first_classes(
    tiny: Recipe, colors: Dataset, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_class = colors.subset(colors.labels.argsort(stable=True).tolist())
    scored: list[torch.Tensor] = []

    def spy(
        model: Classifier, images: torch.Tensor, labels: torch.Tensor, **more: object
    ) -> object:
        scored.append(labels)
        return {"clean": 0.5, "fgsm": 0.5, "pgd": 0.5}

    monkeypatch.setattr(context, "score", spy)
    train(replace(tiny, monitor_limit=8), by_class, out=out, device=CPU)
    assert {len(labels) for labels in scored} == {8}
    assert len(scored[0].unique()) > len(by_class.classes) / 2
    assert all(torch.equal(labels, scored[0]) for labels in scored)


def test_a_full_disk_leaves_the_last_good_checkpoint(
    tiny: Recipe, colors: Dataset, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = Classifier(Architecture(arch="wide_resnet10_1", stem="cifar", num_classes=2))
    good = Sidecar(architecture=classifier.architecture, classes=("a", "b"))
    save_checkpoint(out, classifier, good)
    before = out.read_bytes()

    def full(path: Path, write: object) -> Path:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    real = files.stage
    monkeypatch.setattr(
        files, "stage", lambda p, w: full(p, w) if p.name == "state.pt" else real(p, w)
    )
    with pytest.raises(TrainingError, match=r"state\.pt: .*No space left"):
        train(tiny, colors, out=out, device=CPU)
    assert out.read_bytes() == before
    assert load_checkpoint(out).sidecar.classes == ("a", "b")


def loss_turns_nan(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Let the `at`-th loss of the run, from 1, be NaN."""
    calls, real = iter(range(1, 1000)), step_module.objective

    def objective(*args: object, **kwargs: object) -> torch.Tensor:
        loss: torch.Tensor = real(*args, **kwargs)  # type: ignore[arg-type]
        return loss * torch.nan if next(calls) == at else loss

    monkeypatch.setattr(step_module, "objective", objective)


@pytest.mark.parametrize("every", [1, 3])
def test_non_finite_loss_stops_the_run_and_keeps_the_previous_state(
    every: int, tiny: Recipe, colors: Dataset, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where losses are read every few steps, as on a GPU."""
    made, seen = Run.__post_init__, []

    def post_init(run: Run) -> None:
        made(run)
        run.check_every = every

    monkeypatch.setattr(Run, "__post_init__", post_init)
    loss_turns_nan(monkeypatch, at=6)  # the second step of the second epoch
    with pytest.raises(
        TrainingError, match=r"epoch 1, step 2; lower .* the last state .* is in .*state\.pt"
    ):
        train(tiny, colors, out=out, device=CPU, observe=lambda p: seen.append(p.step))
    assert seen[5:] == ([1] if every == 1 else [1, 2])  # and not one step more
    state = load_state(RunFolder.of(out).state)
    assert (state.phase, state.epoch, state.step) == (1, 0, 0)
    assert all(bool(value.isfinite().all()) for value in state.model.values())


def test_epochs_between_evaluations_are_not_scored(
    tiny: Recipe, colors: Dataset, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phases = (replace(tiny.phases[0], epochs=3), replace(tiny.phases[0], name="b", epochs=5))
    scores = iter((0.1, 0.2, 0.3, 0.9, 0.4))
    monkeypatch.setattr(
        context,
        "score",
        lambda *args, **kwargs: dict.fromkeys(("clean", "fgsm", "pgd"), next(scores)),
    )
    recipe = replace(tiny, phases=phases, score_every=2)
    sidecar = train(recipe, colors, out=out, device=CPU)
    rows = [json.loads(line) for line in RunFolder.of(out).metrics.read_text().splitlines()]
    assert [row["epoch"] for row in rows if row["n"]] == [2, 3, 5, 7, 8]
    assert [row["epoch"] for row in rows if row["pgd"] is None] == [1, 4, 6]
    assert all(row["loss"] > 0 for row in rows)
    assert sidecar.recipe["kept_epoch"] == 7


def test_too_few_images_are_refused(tiny: Recipe, colors: Dataset, out: Path) -> None:
    expected = r"at least one batch of 16 images .*; try --set batch_size=8$"
    with pytest.raises(TrainingError, match=expected):
        train(tiny, colors.limit(16), out=out, device=CPU)
    with pytest.raises(TrainingError, match="held_out: expected to hold out 1 to 15 of 16 images"):
        train(replace(tiny, held_out=0.01), colors.limit(16), out=out, device=CPU)


def test_a_run_learns(tiny: Recipe, colors: Dataset, out: Path) -> None:
    phase = replace(tiny.phases[0], epochs=6)
    train(replace(tiny, phases=(phase,)), colors, out=out, device=CPU)
    rows = [json.loads(line) for line in RunFolder.of(out).metrics.read_text().splitlines()]
    assert rows[-1]["clean"] >= 0.7  # chance is 0.25
    assert rows[-1]["loss"] < rows[0]["loss"]


@pytest.mark.parametrize(
    "change",
    [
        {"arch": "resnet18", "stem": "imagenet", "optimizer": "sgd", "weight_decay": 5e-4},
        {"ema_decay": 0.0},
        {"gradient_clip": 0.0},
        {"label_smoothing": 0.0},
        {"precision": "bf16", "input_size": 32},
        {
            "arch": "resnet18",
            "input_size": 8,
            "activation": "silu",
            "mean": (0.5,) * 3,
            "std": (0.25,) * 3,
        },
        {"norm": "l2", "eps": 0.5},
        {"select": "mean", "zero_init_residual": True},
    ],
)
def test_every_technique_can_be_switched(
    change: dict[str, object], tiny: Recipe, colors: Dataset, out: Path
) -> None:
    phase = Phase(
        name="adversarial",
        epochs=1,
        learning_rate=1e-3,
        parts=(AdversarialPart(kind="n-fgsm"),),
    )
    recipe = replace(tiny, phases=(phase,), **change)  # type: ignore[arg-type]
    enlarged = F.interpolate(colors.images, size=recipe.input_size)
    colors = replace(colors, images=enlarged)
    progress: list[Progress] = []
    train(recipe, colors, out=out, device=CPU, observe=progress.append)
    checkpoint = load_checkpoint(out)
    architecture = checkpoint.classifier.architecture
    for field in ("arch", "stem", "activation", "mean", "std"):
        assert getattr(architecture, field) == getattr(recipe, field)
    assert checkpoint.sidecar.threat_model == ThreatModel(norm=recipe.norm, eps=recipe.eps)
    assert [p.step for p in progress] == [1, 2, 3, 4, 4]
    assert progress[-1].row is not None
    assert progress[0].seconds_left > 0
    assert progress[-1].seconds_left == 0


@pytest.mark.parametrize("name", ["gpu", pytest.param("fast", marks=pytest.mark.slow)])
def test_small_gpu_recipes_run_and_resume(name: str, colors: Dataset, tmp_path: Path) -> None:
    """Every field as it is, but for the size: one epoch a phase, a small network and few images."""
    full = named_recipe(name)
    phases = tuple(replace(phase, epochs=1) for phase in full.phases)
    recipe = replace(
        full, arch="wide_resnet10_1", input_size=8, batch_size=16, held_out=0.2, phases=phases
    )
    colors = replace(colors, images=colors.images[:, :, :8, :8])
    whole, stopped = tmp_path / "whole.pt", tmp_path / "stopped.pt"
    train(recipe, colors, out=whole, device=CPU)
    with pytest.raises(Stopped):  # in the last phase, after 4 steps in each of the others
        train(recipe, colors, out=stopped, device=CPU, should_stop=stop_after(10))
    sidecar = train(recipe, colors, out=stopped, device=CPU, resume=True)
    assert stopped.read_bytes() == whole.read_bytes()
    assert sidecar.architecture.stem == "cifar"
    assert sidecar.recipe["phases"][2]["awp"] == full.phases[2].awp
    rows = [json.loads(line) for line in RunFolder.of(whole).metrics.read_text().splitlines()]
    assert [row["phase"] for row in rows] == ["clean", "adversarial", "strong"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_run_keeps_the_recipe(tiny: Recipe, colors: Dataset, tmp_path: Path) -> None:
    """The first epoch, within the rounding of kernels that add up in another order."""
    losses = {}
    for choice in ("on", "off"):
        recipe = replace(tiny, compile=choice)  # type: ignore[arg-type]
        out = tmp_path / f"{choice}.pt"
        train(recipe, colors, out=out, device=CPU)
        rows = RunFolder.of(out).metrics.read_text().splitlines()
        losses[choice] = json.loads(rows[0])["loss"]
    assert losses["on"] == pytest.approx(losses["off"], rel=0.02)


def test_awp_starts_at_its_configured_epoch(tiny: Recipe, colors: Dataset, tmp_path: Path) -> None:
    phase = replace(tiny.phases[1], epochs=1)  # 4 steps

    def weights(name: str, **changes: float) -> bytes:
        recipe = replace(tiny, phases=(replace(phase, **changes),))  # type: ignore[arg-type]
        out = tmp_path / f"{name}.pt"
        train(recipe, colors, out=out, device=CPU)
        return out.read_bytes()

    plain = weights("plain")
    assert weights("never", awp=0.1, awp_from=0.9) == plain
    assert weights("at the last step", awp=0.1, awp_from=0.7) != plain


def test_last_model_is_kept_if_the_recipe_says_so(
    tiny: Recipe, colors: Dataset, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    falling = iter((0.9, 0.8, 0.7))
    monkeypatch.setattr(
        context,
        "score",
        lambda *args, **kwargs: dict.fromkeys(("clean", "fgsm", "pgd"), next(falling)),
    )
    sidecar = train(replace(tiny, select="last"), colors, out=out, device=CPU)
    assert sidecar.recipe["kept_epoch"] == 3
