import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import ablation
from benchmarks.ablation import LINES, Job, finished, results, split, table
from training.recipe import Recipe


def row(name: str, seed: int, clean: int, pgd: int) -> dict[str, object]:
    correct = {"clean": clean, "fgsm": 50, "pgd-20": pgd}
    sizes = {"n": 200, "images": 1000, "data_sha256": "0" * 64}
    return {"name": name, "seed": seed, **sizes, "correct": correct, "seconds": 60, "passes": 34}


@pytest.mark.parametrize("name", [name for name in LINES if name not in ("base", "classic")])
def test_ablation_changes_the_recipe_but_not_its_epochs(name: str) -> None:
    recipe, base = LINES[name].recipe(), LINES["base"].recipe()
    assert recipe != base
    assert recipe.epochs == base.epochs - (name == "one-phase-passes")


def test_classic_changes_only_its_length() -> None:
    recipe: Recipe = LINES["classic"].recipe()
    assert [phase.epochs for phase in recipe.phases] == [5, 3]
    assert (recipe.optimizer, recipe.batch_size, recipe.weight_decay) == ("sgd", 256, 1e-4)
    assert recipe.phases[1].parts[2].steps == 20


def test_table_has_means_over_seeds_and_differences() -> None:
    rows = [
        row("base", 0, 100, 40),
        row("base", 1, 102, 42),
        row("awp", 0, 90, 0),  # run again below
        row("awp", 0, 98, 46),
        row("awp", 1, 98, 44),
    ]
    lines = table(rows).splitlines()
    assert lines[2:] == [
        "| base: 3 clean, 5 N-FGSM epochs "
        "| 2 | 50.5 | 25.0 | 20.5 | 15.5 to 26.6 | +0.0 | 0.0 | 60 | 34 |",
        "| AWP 0.005 in the last half "
        "| 2 | 49.0 | 25.0 | 22.5 | 17.3 to 28.8 | +2.0 | 1.4 | 60 | 34 |",
    ]


@pytest.mark.parametrize("other", [{"n": 100}, {"images": 500}, {"data_sha256": "1" * 64}])
def test_runs_of_other_sizes_or_data_share_no_table(other: dict[str, object]) -> None:
    with pytest.raises(SystemExit, match="expected one number of training images"):
        table([row("base", 0, 100, 40), row("awp", 0, 98, 46) | other])


def test_runs_share_training_images_and_score_others(tmp_path: Path) -> None:
    pixels = np.arange(60, dtype=np.uint8)[:, None, None, None] * np.ones((60, 3, 32, 32), np.uint8)
    np.savez(tmp_path / "train.npz", images=pixels, labels=np.arange(60) % 2)

    def ids(seed: int) -> tuple[set[int], set[int]]:
        job = Job(
            name="base",
            seed=seed,
            data=str(tmp_path / "train.npz"),
            images=30,
            scored=20,
            device="cpu",
        )
        kept, scored = split(job)
        return {int(x[0, 0, 0]) for x in kept.images}, {int(x[0, 0, 0]) for x in scored.images}

    kept, scored = ids(0)
    assert (len(kept), len(scored), len(kept & scored)) == (30, 20, 0)
    assert ids(1) == (kept, scored)


def test_truncated_result_line_is_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ablation.jsonl"
    whole = {**row("base", 0, 100, 40), "images": 10, "n": 4}
    path.write_text(json.dumps(whole) + "\n" + json.dumps(whole)[:30])
    assert finished(path) == [whole]
    asked: list[tuple[str, int]] = []

    def run(job: Job) -> dict[str, object]:
        asked.append((job.name, job.seed))
        return {**row(job.name, job.seed, 100, 40), "images": job.images, "n": job.scored}

    monkeypatch.setattr(ablation, "run", run)
    argv = ["ablation", "--json", str(path), "--images", "10", "--scored", "4"]
    argv += ["--only", "base", "awp", "--seeds", "0", "1"]
    monkeypatch.setattr("sys.argv", argv)
    with CliRunner().isolation():
        ablation.main()
        assert asked == [("awp", 0), ("base", 1), ("awp", 1)]
        ablation.main()  # and nothing is left to do
    assert len(asked) == 3
    assert len(finished(path)) == 4
    assert list(results([], workers=1)) == []
