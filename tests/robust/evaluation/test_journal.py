"""An evaluation stopped anywhere and resumed gives the same result."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robust.attacks import AttackSettings, ModelError, resolve_attack
from robust.classifier import Architecture, Classifier
from robust.digest import module_digest
from robust.evaluation import Evaluation, JournalError, evaluate_batches
from robust.evaluation import journal as journal_module
from robust.evaluation.journal import Journal, attack_text
from robust.threat_model import ThreatModel

CPU = torch.device("cpu")
BALL = ThreatModel(eps=8 / 255)
Data = tuple[Tensor, Tensor]
Short = Callable[[ThreatModel], AttackSettings]
PROBING = 40 + 8 + 16 + 3 * 8  # rows of the probes: logits, gradients, twice, normalized


def parts(model: nn.Module, data: Data, path: Path | None, **changes: Any) -> Any:
    values: dict[str, Any] = {
        "num_classes": 2,
        "attacks": [resolve_attack("pgd-5", BALL)],
        "device": CPU,
        "batch_size": 9,
        "journal": path,
    }
    return evaluate_batches(model, *data, **(values | changes))


def last(results: Any) -> Evaluation:
    *_, result = results
    assert isinstance(result, Evaluation)
    return result


def spent(path: Path) -> int:
    """Rows that what is finished took, each success asked again among them."""
    connection = sqlite3.connect(path)
    (count,) = connection.execute(
        "SELECT sum((forwards + fooled) * (stage != 'clean')) FROM finished"
    ).fetchone()
    connection.close()
    return int(count or 0)


@pytest.mark.parametrize("names", [("pgd-5", "autoattack"), ("fgsm", "pgd-5", "minimal")])
def test_resumed_evaluation_gives_the_same_result(
    model: nn.Module, linear_data: Data, short: Short, names: tuple[str, ...], tmp_path: Path
) -> None:
    attacks = [short(BALL) if n == "autoattack" else resolve_attack(n, BALL) for n in names]
    settings = {"attacks": attacks, "curve": 12}
    model.images = 0
    whole = list(parts(model, linear_data, None, **settings))
    rows = model.images
    for stop in range(1, len(whole), 5):
        path = tmp_path / f"{stop}.journal"
        first = parts(model, linear_data, path, **settings)
        for _ in range(stop):
            next(first)
        first.close()
        finished = spent(path)
        model.images = 0
        assert last(parts(model, linear_data, path, **settings)) == whole[-1]
        assert model.images == rows - finished
    # At the end there is nothing left to do but the probes.
    model.images = 0
    assert last(parts(model, linear_data, path, **settings)) == whole[-1]
    assert model.images == PROBING


def test_resumes_at_any_batch_size(model: nn.Module, linear_data: Data, tmp_path: Path) -> None:
    path = tmp_path / "journal"
    whole = last(parts(model, linear_data, None))
    first = parts(model, linear_data, path)
    for _ in range(7):
        next(first)
    first.close()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    shuffled = (linear_data[0][order], linear_data[1][order])  # nor does their order matter
    assert last(parts(model, shuffled, path, batch_size=16)) == whole


def test_finished_images_are_recorded_without_waiting_for_the_batch(
    model: nn.Module,
    linear_data: Data,
    digits: object,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a batch of all images the first to finish wait neither for the last nor in vain."""
    monkeypatch.setattr("robust.evaluation.stages.RECORD_SECONDS", 0.0)
    shown = list(parts(model, linear_data, tmp_path / "journal", batch_size=40))
    assert len(shown) > 3
    assert shown[-1] == last(parts(model, linear_data, None))


CHILD = """
import os, signal, sys
from pathlib import Path
import torch
from robust.attacks import resolve_attack
from robust.evaluation import JournalError, evaluate_batches
from robust.threat_model import ThreatModel

torch.set_num_threads(1)
state, taken, path = torch.load(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
passes = 0

def model(x):
    margin = (x * state["w"]).flatten(1).sum(dim=1) + state["bias"]
    return torch.stack([torch.zeros_like(margin), margin], dim=1)

def watch():
    global passes
    passes += path.exists()
    if passes == 16:
        os.kill(os.getpid(), signal.SIGKILL)

def run(path):
    return evaluate_batches(
        model, state["images"], state["labels"], num_classes=2, device=torch.device("cpu"),
        attacks=[resolve_attack("pgd-5", ThreatModel(eps=8 / 255))],
        batch_size=4, journal=path, model_id="linear", watch=watch,
    )

try:
    list(run(taken))
except JournalError as error:
    print(error, flush=True)
passes = 0
for part in run(path):
    print(part.done, flush=True)
"""


def test_killed_process_resumes(model: nn.Module, linear_data: Data, tmp_path: Path) -> None:
    taken, path = tmp_path / "taken", tmp_path / "journal"
    state = {"w": model.w.detach(), "bias": model.bias}
    state |= {"images": linear_data[0], "labels": linear_data[1]}
    torch.save(state, tmp_path / "state.pt")
    holder = parts(model, linear_data, taken, model_id="linear")
    for _ in range(2):
        next(holder)
    child = subprocess.run(
        [sys.executable, "-c", CHILD, tmp_path / "state.pt", taken, path],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=Path(__file__).parents[3],
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    refused, *shown = child.stdout.splitlines()
    assert refused == (
        f"{taken}: is in use by another evaluation; wait for it, or give another file"
    )
    assert len(shown) > 4
    whole = last(parts(model, linear_data, None))
    finished = spent(path)
    model.images = 0
    last(parts(model, linear_data, None))
    rows, model.images = model.images, 0
    assert last(parts(model, linear_data, path, model_id="linear")) == whole
    assert model.images == rows - finished < rows
    assert last(holder) == whole  # the one that was there first is not disturbed


def change(values: dict[str, Any], name: str, data: Data, model: nn.Module) -> dict[str, Any]:
    if name == "model":
        model.w.data += 1e-3
    elif name == "data":
        labels = data[1].clone()
        labels[3] = 1 - labels[3]
        values["data"] = (data[0], labels)
    elif name == "seed":
        values["attacks"] = [resolve_attack("pgd-5", BALL, seed=1)]
    else:
        values["precision"] = "bf16"
    return values


@pytest.mark.parametrize("name", ["model", "data", "seed", "precision"])
def test_journal_of_another_evaluation_is_rejected(
    model: nn.Module, linear_data: Data, name: str, tmp_path: Path
) -> None:
    path = tmp_path / "journal"
    first = parts(model, linear_data, path)
    next(first)
    first.close()
    before = path.read_bytes()
    values = change({"data": linear_data}, name, linear_data, model)
    with pytest.raises(JournalError, match=f"the same evaluation, but its {name} .*is .*, not "):
        list(parts(model, values.pop("data"), path, **values))
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        (("pgd", {}), ("pgd-50", {}), "steps of pgd is 20, not 50"),
        (("pgd", {}), ("pgd", {"eps": 4 / 255}), "eps of pgd is 8/255, not 4/255"),
        (("pgd", {}), ("pgd", {"eps": 0.1}), "eps of pgd is 8/255, not 0.1"),
        (("pgd", {}), ("pgd", {"eps": 8.00001 / 255}), r"eps of pgd is 0\.0313\d+, not 0\.0313\d+"),
        (("pgd", {}), ("pgd", {"alpha": 4 / 255}), "alpha of pgd is 2/255, not 4/255"),
        (("fgsm", {}), ("fgsm", {"norm": "l2"}), "norm of fgsm is linf, not l2"),
        (("fgsm", {}), ("pgd-5", {}), "attacks are fgsm, not pgd-5"),
        (
            ("autoattack", {}),
            ("autoattack", {"stages": ["pgd-5", "square-10"]}),
            "stages of autoattack is the default, not pgd-5, square-10",
        ),
    ],
)
def test_journal_error_names_the_differing_setting(
    one: tuple[str, Any], other: tuple[str, Any], words: str, tmp_path: Path
) -> None:
    def manifest(name: str, settings: dict[str, Any]) -> dict[str, Any]:
        ball = {key: settings.pop(key) for key in ("norm", "eps") if key in settings}
        attack = resolve_attack(name, ThreatModel(**ball), **settings)
        return {"attacks": [attack_text(attack)]}

    path = tmp_path / "journal"
    Journal(path, manifest(*one)).close()
    with pytest.raises(JournalError, match=f"the same evaluation, but its {words}; give another"):
        Journal(path, manifest(*other))


def test_default_stages_are_recorded_as_before_stages_were() -> None:
    usual = resolve_attack("autoattack", BALL, seed=3)
    assert attack_text(usual) == str(usual)
    assert "stages" not in str(usual)


def test_equal_stages_of_two_attacks_are_recorded_apart(
    model: nn.Module, linear_data: Data, tmp_path: Path
) -> None:
    attacks = [
        resolve_attack("autoattack", BALL, stages=[first, "square-30"])
        for first in ("square-3", "pgd-5")
    ]
    whole = last(parts(model, linear_data, None, attacks=attacks))
    left, fewer = (item.stages[1].attacked for item in whole.attacks)
    assert left > fewer > 0
    assert last(parts(model, linear_data, tmp_path / "journal", attacks=attacks)) == whole


def classifier(**changes: Any) -> Classifier:
    """Always the same weights."""
    architecture = Architecture(
        arch="wide_resnet10_1", stem="cifar", num_classes=2, input_size=8, **changes
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Classifier(architecture).eval()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mean": (0.5, 0.5, 0.5)}, r"mean is \[0.0, 0.0, 0.0\], not \[0.5, 0.5, 0.5\]"),
        ({"std": (0.5, 0.5, 0.5)}, r"std is \[1.0, 1.0, 1.0\], not \[0.5, 0.5, 0.5\]"),
        ({"activation": "silu"}, "activation is relu, not silu"),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_equal_weights_in_another_architecture_are_another_model(
    change: dict[str, Any], words: str, wrapped: bool, linear_data: Data, tmp_path: Path
) -> None:
    path = tmp_path / "journal"
    images = linear_data[0].repeat(1, 1, 2, 2)[:4]
    for model, refused in ((classifier(), False), (classifier(**change), True)):
        settings: dict[str, Any] = {"attacks": []}
        if wrapped:
            settings |= {"model_id": "hash of the file", "architecture": model.architecture}
        given: Any = model.forward if wrapped else model
        results = parts(given, (images, linear_data[1][:4]), path, **settings)
        if refused:
            with pytest.raises(JournalError, match=f"but its {words}; give"):
                list(results)
        else:
            list(results)


def test_digest_covers_all_that_logits_depend_on() -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> object:
            return {"scale": self.scale, "of": object()}

        def set_extra_state(self, state: object) -> None: ...

    def digest(**changes: Any) -> str:
        values = {"mean": 0.0, "scale": 1, "stride": 1, "weight": 0.0} | changes
        extra = Extra(2, 2)
        extra.scale = values["scale"]
        net = nn.Sequential(nn.Conv2d(3, 3, 1, stride=values["stride"]), extra)
        for parameter in net.parameters():
            parameter.data.fill_(values["weight"])
        net.register_buffer("mean", torch.tensor(values["mean"]), persistent=False)
        return module_digest(net)

    assert digest() == digest()
    others = [{"mean": 0.5}, {"scale": 2}, {"stride": 2}, {"weight": 1.0}]
    assert len({digest(), *(digest(**change) for change in others)}) == 5


class Attributes(nn.Module):
    def __init__(self, name: str, value: object) -> None:
        super().__init__()
        self.net = nn.Identity()
        setattr(self.net, name, value)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.tensor([0.4]), torch.tensor([0.5])),
        (np.array([0.4]), np.array([0.5])),
        (np.float32(0.4), np.float32(0.5)),
        (0.4, 0.5),
        ("relu", "silu"),
        (True, None),
        ((0.4, 0.4), (0.4, 0.5)),
        ([{"mean": torch.zeros(3)}], [{"mean": torch.ones(3)}]),
        ([nn.Linear(2, 2)], [nn.Linear(2, 2)]),  # torch sees no module in a plain list
    ],
)
def test_digest_covers_plain_attributes(one: object, other: object) -> None:
    digests = {module_digest(Attributes("_mean", value)) for value in (one, other)}
    assert len(digests) == 2
    assert module_digest(Attributes("_mean", one)) in digests


def test_digest_ignores_what_does_not_change_logits() -> None:
    net = Attributes("cache", [object()])
    net.net.cache.append(net.net.cache)
    net.net.cache.append(net)
    before = module_digest(net)
    net.eval()
    net.register_forward_hook(lambda *_: None)
    net.net.cache[0] = object()
    assert module_digest(net) == before


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
@pytest.mark.filterwarnings("ignore:.*is deprecated")
def test_digest_ignores_a_weight_that_each_pass_computes(norm: str) -> None:
    net = getattr(nn.utils, norm)(nn.Linear(2, 2)).eval()
    state = {name: torch.ones_like(value) for name, value in net.state_dict().items()}
    net.load_state_dict(state)
    before = module_digest(net)  # its weight is still that of the random initialization
    with torch.no_grad():
        net(torch.ones(1, 2))
    assert module_digest(net) == before


def test_model_without_a_state_dict_needs_a_name(linear_data: Data, tmp_path: Path) -> None:
    def model(x: Tensor) -> Tensor:
        return x[:, :2, 0, 0]

    with pytest.raises(ValueError, match="expected a model_id with a journal"):
        list(parts(model, linear_data, tmp_path / "journal"))  # type: ignore[arg-type]


def test_rejected_model_leaves_no_journal(
    model: nn.Module, linear_data: Data, tmp_path: Path
) -> None:
    path = tmp_path / "journal"
    with pytest.raises(ModelError, match="logits for 3 classes"):
        list(parts(model, linear_data, path, num_classes=3))
    assert not path.exists()


def other_database(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE about (name TEXT)")
    connection.close()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_bytes(b"no database " * 500), "expected a journal of an eval"),
        (lambda path: path.mkdir(), "could not be opened: unable to open"),
        (other_database, "expected a journal of an evaluation, got another SQLite database"),
    ],
)
def test_files_that_are_not_journals_are_left_unchanged(
    model: nn.Module,
    linear_data: Data,
    make: Callable[[Path], object],
    message: str,
    tmp_path: Path,
) -> None:
    path = tmp_path / "journal"
    make(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(JournalError, match=message):
        list(parts(model, linear_data, path))
    assert before is None or path.read_bytes() == before


@pytest.mark.parametrize("path", [Path("/proc/journal"), Path("/nowhere/at/all")])
def test_unwritable_path_is_reported(model: nn.Module, linear_data: Data, path: Path) -> None:
    with pytest.raises(JournalError, match=f"{path}: could not be opened"):
        list(parts(model, linear_data, path))


def test_damaged_journal_is_rejected(model: nn.Module, linear_data: Data, tmp_path: Path) -> None:
    path = tmp_path / "journal"
    list(parts(model, linear_data, path))
    whole = path.read_bytes()
    path.write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096))
    with pytest.raises(JournalError, match="journal: could not be"):
        list(parts(model, linear_data, path))
    path.write_bytes(whole)
    connection = sqlite3.connect(path)
    connection.execute("UPDATE finished SET image = 1000 WHERE image = 3")
    connection.commit()
    connection.close()
    with pytest.raises(JournalError, match="is damaged: it has a row"):
        list(parts(model, linear_data, path))


def test_full_disk_is_reported(
    model: nn.Module, linear_data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was finished before is kept, and gone on with once there is room."""
    path = tmp_path / "journal"
    attack = resolve_attack("pgd-5", BALL)
    attacks = [replace(attack, seed=seed) for seed in range(8)]
    check = Journal._check

    def no_room(journal: Journal, manifest: dict[str, Any]) -> None:
        check(journal, manifest)
        journal._db.execute("PRAGMA max_page_count=6")

    monkeypatch.setattr(journal_module.Journal, "_check", no_room)
    with pytest.raises(JournalError, match="could not be written: database or disk is full"):
        list(parts(model, linear_data, path, attacks=attacks))
    monkeypatch.undo()
    assert spent(path) > 20
    again = last(parts(model, linear_data, path, attacks=attacks))
    assert again == last(parts(model, linear_data, None, attacks=attacks))


def test_different_number_of_processes_is_rejected(
    model: nn.Module, linear_data: Data, tmp_path: Path
) -> None:
    path = tmp_path / "journal"
    last(parts(model, linear_data, tmp_path / "journal.1-of-2"))
    with pytest.raises(JournalError, match="as started the journal, 2, got 1; start as many"):
        last(parts(model, linear_data, path))
    assert not path.exists()
    assert last(parts(model, linear_data, tmp_path / "journal.1-of-2")).n == 40
