import json
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from robust import files
from robust.loading.options import NAMED_MEANS, NAMED_STDS
from training.inputs import differences_from
from training.recipe import Phase, Recipe
from training.recipe_sources import load_recipe, recorded_run
from training.recipe_values import override, recipe_from_values, to_toml
from training.recipes import RECIPES, gpu, named_recipe, quick


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipes_round_trip_through_toml_and_json(name: str, tmp_path: Path) -> None:
    recipe = named_recipe(name)
    toml, as_json = tmp_path / "mine.toml", tmp_path / "mine.json"
    toml.write_text(to_toml(recipe))
    files.write_json(as_json, recipe.to_dict())
    assert load_recipe(str(toml)) == recipe
    assert load_recipe(str(as_json)) == recipe
    assert load_recipe(name) == recipe


def test_sizes_are_written_as_fractions_and_every_field_is_there() -> None:
    text = to_toml(gpu())
    assert 'eps = "8/255"' in text
    values = tomllib.loads(text)
    assert values["phases"][1]["parts"][0]["alpha"] == "8/255"
    assert values.keys() == gpu().to_dict().keys()
    assert values["phases"][0].keys() == gpu().to_dict()["phases"][0].keys()
    odd = replace(quick(), eps=0.0301, norm="l2", name='a "b" ü\\')
    assert recipe_from_values(tomllib.loads(to_toml(odd))) == odd


def test_run_is_repeated_from_its_record(tmp_path: Path) -> None:
    recipe = replace(quick(), batch_size=32)
    run, sidecar = tmp_path / "run.json", tmp_path / "model.json"
    files.write_json(run, {"recipe": recipe.to_dict(), "seed": 3, "init": None, "data": {}})
    recorded = {**recipe.to_dict(), "kept_epoch": 4, "init": None, "minutes": {"given": 2}}
    files.write_json(sidecar, {"format_version": 1, "recipe": recorded, "seed": 5})
    assert load_recipe(str(run)) == load_recipe(str(sidecar)) == recipe
    assert (recorded_run(str(run))["seed"], recorded_run(str(sidecar))["seed"]) == (3, 5)
    assert recorded_run("quick") == {}


def test_differences_from_a_recorded_run_are_listed(tmp_path: Path) -> None:
    data, validation = {"name": "a.npz", "sha256": "1"}, {"name": "val.npz", "sha256": "2"}
    this: dict[str, object] = {"seed": 0, "data": data, "init": None, "validation": None}
    run, sidecar = tmp_path / "run.json", tmp_path / "model.json"
    options = {"init": "c0ffee", "validation": validation}
    minutes = {"minutes": {"given": 2, "fitted_steps": {"clean": 7}}}
    recipe = quick().to_dict()
    record = {"recipe": recipe, "seed": 3, "data": data, **options, **minutes}
    files.write_json(run, {**record, "class_counts": {"cat": {"train": 9}, "dog": {"train": 9}}})
    record = {"recipe": {**recipe, **options, **minutes}, "seed": 3, "data": data}
    files.write_json(sidecar, {**record, "classes": ["cat", "dog"]})
    for path in (run, sidecar):
        recorded = recorded_run(str(path))
        assert differences_from(recorded, this, ("0", "1")) == [
            "used --seed 3, this run uses 0",
            "started from weights of a file, this run from others (--init)",
            "used --val val.npz, this run uses none",
            "used --classes cat,dog, this run uses 0,1",
            "had its steps fitted by --minutes (7 of clean), this run has whole epochs",
        ]
        other = {**this, "data": {"name": "b.npz", "sha256": "3"}}  # a recipe used anew
        assert differences_from(recorded, other, ("0",)) == ["used --seed 3, this run uses 0"]
        same = {**this, "seed": 3, **options}
        assert differences_from(recorded, same, ("cat", "dog"))[:-1] == []
    assert differences_from({}, this, ("0", "1")) == []


def test_a_file_needs_only_a_name_and_phases() -> None:
    values = tomllib.loads(
        'name = "short"\nmean = "imagenet"\neps = "4/255"\n[[phases]]\nname = "clean"\nepochs = 1\n'
    )
    expected = Recipe(
        name="short",
        phases=(Phase(name="clean", epochs=1),),
        mean=NAMED_MEANS["imagenet"],
        std=NAMED_STDS["imagenet"],
        eps=4 / 255,
    )
    assert recipe_from_values(values) == expected


def test_fields_are_set_from_the_command_line() -> None:
    changed = override(
        gpu(),
        [
            "adversarial.epochs=20",
            "batch_size=512",
            "strong.awp=0",
            "clean.augmentation.cutout=4",
            "adversarial.parts.0.alpha=4/255",
            "eps = 6/255",
            "optimizer=adamw",
            "zero_init_residual=true",
            "weight_decay=.05",
            "std=0.2,0.3,0.4",
        ],
    )
    clean, adversarial, strong = changed.phases
    assert (changed.batch_size, changed.eps, changed.optimizer) == (512, 6 / 255, "adamw")
    assert (changed.zero_init_residual, changed.weight_decay) == (True, 0.05)
    assert changed.std == (0.2, 0.3, 0.4)
    assert (adversarial.epochs, adversarial.parts[0].alpha) == (20, 4 / 255)
    assert (strong.awp, clean.augmentation.cutout) == (0, 4)
    assert strong == replace(gpu().phases[2], awp=0)
    assert override(gpu(), []) == gpu()


def test_list_of_parts_can_be_set() -> None:
    parts = json.dumps([{"kind": "clean", "share": 0.5}, {"kind": "pgd", "share": 0.5, "steps": 7}])
    changed = override(quick(), [f"adversarial.parts={parts}"])
    assert [part.kind for part in changed.phases[1].parts] == ["clean", "pgd"]
    assert changed.phases[1].parts[1].steps == 7


@pytest.mark.parametrize("name", ["imagenet", "cifar10", "none"])
def test_a_named_normalization_sets_mean_and_std(name: str) -> None:
    changed = override(replace(quick(), mean=(0.5,) * 3), [f"mean={name}"])
    assert (changed.mean, changed.std) == (NAMED_MEANS[name], NAMED_STDS[name])


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("batch_size", "--set: expected FIELD=VALUE, got 'batch_size'"),
        ("batchsize=3", "--set batchsize: .*to be one of batch_size, .*got 'batchsize'"),
        ("adverserial.epochs=3", "adverserial.epochs: .*to be one of adversarial.FIELD"),
        ("adversarial.epoch=3", "adversarial.epoch: .*to be one of epochs, .*got 'epoch'"),
        ("adversarial=3", "adversarial: expected a field after the phase's name, got none"),
        ("adversarial.parts.3.steps=1", r"expected parts\.0 to parts\.2, got '3'"),
        ("adversarial.parts.x.steps=1", r"expected parts\.0 to parts\.2, got 'x'"),
        ("adversarial.epochs.x=1", "adversarial.epochs.x: .*to be one of none, got 'x'"),
        ("phases=3", "--set phases: expected field"),
        ("batch_size=many", "^batch_size: expected a whole number of at least 2, got 'many'"),
        ("batch_size=1", "^batch_size: expected a whole number of at least 2, got 1"),
        ("batch_size=64.0", "^batch_size: expected a whole number of at least 2, got 64.0"),
        ("batch_size=1_0", "^batch_size: expected a whole number of at least 2, got '1_0'"),
        ("batch_size=true", "^batch_size: expected a whole number of at least 2, got True"),
        ("adversarial.epochs=-1", "^adversarial.epochs: expected a whole number of at least 0"),
        ("adversarial.warmup=1", r"^adversarial.warmup: expected a number in \[0, 1\), got 1"),
        ("adversarial.loss=TRADES", "^adversarial.loss: expected one of cross-entropy, trades"),
        ("clean.learning_rate=0", "^clean.learning_rate: expected a number more than 0, got 0"),
        ("clean.augmentation.crop_padding=32", "less than the input_size of 32, got 32"),
        ("eps=1_0/255", "^eps: expected a number or a fraction such as 8/255, got '1_0/255'"),
        ("eps=٨/255", "^eps: expected a number or a fraction such as 8/255"),
        ("eps=2", r"^eps: expected an linf eps in \[0, 1\]"),
        ("eps=NaN", "^eps: expected a number of at least 0, got nan"),
        ("eps=1" + "0" * 400, "^eps: expected"),
        ("std=0,1,1", r"^std: expected 3 positive numbers, got \(0, 1, 1\)"),
        ("std=1,1", "^std: expected 3 numbers"),
        ("mean=coco", "^mean: expected 3 numbers or a name such as imagenet, got 'coco'"),
        ("zero_init_residual=1", "^zero_init_residual: expected true or false, got 1"),
        ("adversarial.parts.0.share=0.5", "^adversarial.parts: expected shares that add up to 1"),
        ("adversarial.parts.0=3", "^adversarial.parts.0: expected a table of fields, got 3"),
    ],
)
def test_invalid_override_is_explained(assignment: str, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        override(quick(), [assignment])


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.toml", "name = ", "a.toml: expected a recipe in TOML, got: "),
        ("a.json", "{", "a.json: expected a recipe in JSON, got: "),
        ("a.json", "[" * 100_000, "a.json: expected a recipe in JSON, got: "),
        ("a.json", "[1]", r"a.json: recipe: expected a table of fields, got \[1\]"),
        ("a.toml", 'name = "x"', "a.toml: recipe: expected the field phases, got none"),
        ("a.toml", 'name = "x"\nphases = 3', "a.toml: phases: expected a list, got 3"),
        ("a.toml", 'name = "x"\nphases = []', "a.toml: phases: .*some epochs"),
        (
            "a.toml",
            'name = "x"\nepoch = 3\n[[phases]]\nname = "clean"\nepochs = 1',
            "a.toml: epoch: expected field to be one of .*, got 'epoch'",
        ),
        (
            "a.toml",
            'name = "x"\n[[phases]]\nname = "clean"\nepochs = "3"',
            "a.toml: clean.epochs: expected a whole number of at least 0, got '3'",
        ),
        (
            "a.toml",
            'name = "x"\n[[phases]]\nname = "a b"\nepochs = 3',
            "a.toml: phases: expected a name such as adversarial, got 'a b'",
        ),
    ],
)
def test_invalid_file_is_named_with_the_field(
    name: str, text: str, expected: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=expected):
        load_recipe(str(path))


def test_recipe_from_a_user_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))  # restored afterwards
    (tmp_path / "own_recipes.py").write_text(
        "from dataclasses import replace\nfrom training.recipes import quick\n"
        "def longer():\n    return replace(quick(), name='longer', batch_size=8)\n"
        "def wrong():\n    return 3\nnumber = 3\n"
    )
    assert load_recipe("own_recipes:longer").batch_size == 8
    for source, expected in (
        ("own_recipes:wrong", r"expected a Recipe from wrong\(\), got int"),
        ("own_recipes:number", "expected a function 'number' in own_recipes, got 3"),
        ("os:system", r"os:system: expected a function without arguments, got: missing .*command"),
        ("own_recipes:none", "expected a function 'none' in own_recipes, got None"),
        ("no_such_module:f", "no_such_module:f: expected a module to import, got: No module"),
    ):
        with pytest.raises(ValueError, match=expected):
            load_recipe(source)


def test_unknown_source_lists_names_and_formats() -> None:
    with pytest.raises(ValueError, match=r"one of quick, .*, or FILE.toml, FILE.json or package"):
        load_recipe("slow")
    with pytest.raises(FileNotFoundError):
        load_recipe("none.toml")
