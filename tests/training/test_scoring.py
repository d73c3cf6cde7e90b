"""What is scored during a run, how, and which model is kept."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import robust.packed
from robust import files
from robust.checkpoint import load_checkpoint
from robust.classifier import Architecture, Classifier
from robust.datasets import Dataset
from robust.evaluation import precision as precision_module
from training import context, result
from training.context import Run
from training.ema import refresh_norms
from training.recipe import Recipe
from training.run import train
from training.scoring import final_score, score
from training.step import Trainer

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("choice", "expected"), [("fp32", "fp32"), ("bf16", "bf16 search, fp32 verified")]
)
def test_scores_do_not_depend_on_timing(
    choice: str, expected: str, tiny: Recipe, colors: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a resumed run could keep another model than one that was never stopped."""

    def timed(*args: object, **options: object) -> None:
        raise AssertionError("timed a pass")

    for name in ("MIN_PARAMETERS", "MIN_PASSES"):
        monkeypatch.setattr(precision_module, name, 0)
    monkeypatch.setattr(precision_module, "cpu_multiplies_bf16", lambda: True)
    for module in (precision_module, robust.packed):
        monkeypatch.setattr(module, "compare", timed)
    recipe = replace(tiny, precision=choice)  # type: ignore[arg-type]
    torch.manual_seed(0)
    model = Classifier(
        Architecture(arch=recipe.arch, stem=recipe.stem, num_classes=4, input_size=16)
    )
    trainer = Trainer(model, recipe, device=CPU)
    images, labels = colors.images[:8], colors.labels[:8]
    accuracies = score(trainer, images, labels)
    assert 0 <= accuracies["pgd"] <= accuracies["clean"] <= 1
    found = final_score(trainer, images, labels, threat_model=trainer.threat_model)
    assert found.precision == expected


def test_clean_phase_after_an_adversarial_one_can_be_kept(
    tiny: Recipe, colors: Dataset, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter((0.9, 0.1, 0.2, 0.3))  # of one clean epoch, two adversarial, and one clean
    monkeypatch.setattr(
        context,
        "score",
        lambda *args, **options: dict.fromkeys(("clean", "fgsm", "pgd"), next(scores)),
    )
    phases = (*tiny.phases, replace(tiny.phases[0], name="after"))
    sidecar = train(replace(tiny, phases=phases), colors, out=out, device=CPU)
    assert sidecar.recipe["kept_epoch"] == 4


def test_shown_loss_is_the_mean_of_the_losses_read(
    tiny: Recipe, colors: Dataset, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU losses are read every few steps."""
    made = Run.__post_init__

    def post_init(run: Run) -> None:
        made(run)
        run.check_every = 2

    monkeypatch.setattr(Run, "__post_init__", post_init)
    seen: list[float] = []
    recipe = replace(tiny, phases=tiny.phases[:1])  # an epoch of 4 steps
    train(recipe, colors, out=out, device=CPU, observe=lambda progress: seen.append(progress.loss))
    assert seen[0] == 0
    assert seen[2] == seen[1] > 0
    assert seen[3] not in (seen[1], 0)


def test_last_state_is_written_during_the_final_score(
    tiny: Recipe, colors: Dataset, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scoring, overlapped, real = threading.Event(), [], (files.write_atomic, final_score)

    def write(path: Path, content: object) -> None:
        if path.name == "state.pt":
            overlapped.append(scoring.wait(280))
        real[0](path, content)  # type: ignore[arg-type]

    def scored(*args: object, **options: object) -> object:
        scoring.set()
        return real[1](*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(files, "write_atomic", write)
    monkeypatch.setattr(result, "final_score", scored)
    train(replace(tiny, phases=tiny.phases[:1]), colors, out=out, device=CPU)
    assert overlapped == [True]
    assert not list(out.parent.glob("runs/*/state.pt"))


@pytest.mark.parametrize(("few", "expected"), [(0, 0), (10**6, 3)])
def test_short_epochs_are_scored_with_new_norms(
    few: int,
    expected: int,
    tiny: Recipe,
    colors: Dataset,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Running statistics lag behind the weights, and a lagging model may predict one class."""
    refreshed = []

    def refresh(model: torch.nn.Module, images: torch.Tensor, batch_size: int) -> None:
        refresh_norms(model, images, batch_size)
        refreshed.append({k: v.half() for k, v in model.state_dict().items() if "running" in k})

    monkeypatch.setattr(context, "FEW_STEPS", few)
    monkeypatch.setattr(context, "refresh_norms", refresh)
    train(tiny, colors, out=out, device=CPU)
    assert len(refreshed) == expected
    if refreshed:
        checkpoint = load_checkpoint(out)
        kept = refreshed[checkpoint.sidecar.recipe["kept_epoch"] - 1]
        stored = checkpoint.classifier.net.state_dict()
        for name, values in kept.items():
            assert torch.equal(stored[name.removeprefix("net.")], values.float())
