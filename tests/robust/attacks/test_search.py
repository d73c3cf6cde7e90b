from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robust.attacks import ATTACKS, AttackResult, ModelError, apgd_t, pgd, resolve_attack
from robust.attacks.algorithm import Algorithm
from robust.attacks.apgd import APGD, TargetedAPGD
from robust.attacks.fab import FAB
from robust.attacks.pgd import PGD
from robust.attacks.rows import Rows, Table
from robust.attacks.search import search
from robust.attacks.square import Square
from robust.choices import Norm
from robust.threat_model import ThreatModel

BUDGETS = {"square": 40, "minimal": 5}
STAGES = {
    "autoattack": ("apgd-ce-8", "apgd-t-8", "fab-t-8", "square-40"),
    "audit": ("pma-8", "malt-8", "square-check-120"),  # which checks after 100 queries
}


@pytest.fixture
def y(curved: nn.Module, images: Tensor) -> Tensor:
    """What the model says, but for the last image, which is wrong from the start."""
    predicted = curved(images).argmax(dim=1)
    predicted[-1] = (predicted[-1] + 1) % 10
    curved.calls.clear()
    return predicted


def run(
    name: str, model: Any, x: Tensor, y: Tensor, eps: float, norm: Norm = "linf", **more: Any
) -> AttackResult:
    attack = resolve_attack(
        name,
        ThreatModel(norm=norm, eps=eps),
        steps=BUDGETS.get(name, 8),
        stages=STAGES.get(name),
    )
    return attack.run(model, x, y, early_stop=True, **more)


def searched(
    algorithm: Algorithm[Any], model: Any, x: Tensor, y: Tensor, eps: float, **more: Any
) -> AttackResult:
    parts = list(search(model, algorithm, x, y, eps=torch.full((len(x),), eps), **more))
    index = torch.cat([part.index for part in parts])
    assert sorted(index.tolist()) == list(range(len(x)))  # each image once
    names = vars(parts[0].result)
    return AttackResult(
        **{
            name: torch.cat([getattr(part.result, name) for part in parts])[index.argsort()]
            for name in names
        }
    )


def assert_same(one: AttackResult, other: AttackResult, *, counts: bool = False) -> None:
    for name in ("x_adv", "logits", "success", "distance") + counts * ("forwards", "backwards"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ATTACKS)
def test_batch_size_and_order_change_nothing(
    curved: nn.Module, images: Tensor, y: Tensor, name: str, norm: Norm
) -> None:
    eps = 0.006 if norm == "linf" else 0.06
    whole = run(name, curved, images, y, eps, norm)
    assert 1 < int(whole.success.sum()) < 12  # or the test would show little
    for batch_size in (1, 5):
        assert_same(run(name, curved, images, y, eps, norm, batch_size=batch_size), whole)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    shuffled = run(name, curved, images[order], y[order], eps, norm, batch_size=4)
    assert torch.equal(shuffled.x_adv, whole.x_adv[order])
    assert torch.equal(shuffled.success, whole.success[order])


@pytest.mark.parametrize("name", ATTACKS)
def test_passes_are_counted_as_the_model_saw_them(
    curved: nn.Module, images: Tensor, y: Tensor, name: str
) -> None:
    backwards = []

    def model(x: Tensor) -> Tensor:
        if x.requires_grad:
            backwards.append(len(x))
        return curved(x)  # type: ignore[no-any-return]

    for batch_size in (None, 5):
        curved.calls.clear()
        backwards.clear()
        result = run(name, model, images, y, 0.05, batch_size=batch_size)
        assert sum(curved.calls) == int(result.forwards.sum())
        assert sum(backwards) == int(result.backwards.sum())
        assert bool((result.forwards >= 1).all())


@pytest.mark.parametrize("name", ["pgd", "apgd-ce", "pgd-margin"])
def test_last_iterate_is_scored_without_a_gradient(
    make_linear: Callable[..., nn.Module], x: Tensor, name: str
) -> None:
    model = make_linear(bias=1000.0)  # nothing fools it
    result = run(name, model, x, torch.ones(8, dtype=torch.int64), 0.05)
    assert torch.equal(result.forwards, result.backwards + 1)


def test_fooled_images_are_replaced_in_the_batch(
    curved: nn.Module, images: Tensor, y: Tensor
) -> None:
    algorithm = PGD(norm="linf", relative_alpha=0.25, steps=20)
    together = searched(algorithm, curved, images, y, 0.006, batch_size=4)
    calls = len(curved.calls)
    assert max(curved.calls) == 4
    assert sum(curved.calls) == int(together.forwards.sum()) < 12 * 21
    curved.calls.clear()
    for part in torch.arange(12).split(4):
        searched(algorithm, curved, images[part], y[part], 0.006)
    assert calls < len(curved.calls)


def test_restarts_and_targets_run_only_on_unfooled_images(
    curved: nn.Module, images: Tensor, y: Tensor
) -> None:
    one, many = (
        searched(
            PGD(norm="linf", relative_alpha=0.25, steps=5, runs=runs), curved, images, y, 0.006
        )
        for runs in (1, 4)
    )
    assert 0 < int(one.success.sum()) < 12
    assert torch.equal(many.x_adv[one.success], one.x_adv[one.success])
    assert torch.equal(many.forwards[one.success], one.forwards[one.success])
    assert torch.equal(many.forwards[~many.success], 4 * one.forwards[~many.success])


class InOrder:
    """An algorithm none of whose runs starts before the one before it has failed."""

    def __init__(self, algorithm: Algorithm[Any]) -> None:
        self._algorithm = algorithm

    allow_parallel_runs = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._algorithm, name)


@pytest.mark.parametrize(
    "algorithm",
    [
        TargetedAPGD(norm="linf", steps=10, runs=9),
        FAB(norm="linf", steps=10, runs=9),
    ],
    ids=["apgd-t", "fab-t"],
)
@pytest.mark.parametrize("eps", [0.003, 0.006, 0.01])
def test_parallel_runs_change_nothing_but_the_passes_spent(
    curved: nn.Module, images: Tensor, y: Tensor, algorithm: Algorithm[Any], eps: float
) -> None:
    in_order = searched(InOrder(algorithm), curved, images, y, eps)  # type: ignore[arg-type]
    calls = len(curved.calls)
    curved.calls.clear()
    parallel = searched(algorithm, curved, images, y, eps)
    assert_same(parallel, in_order)
    assert len(curved.calls) <= calls
    if eps == 0.003:  # where most images withstand, all their targets are tried
        assert len(curved.calls) < 0.75 * calls
    assert sum(curved.calls) == int(parallel.forwards.sum()) >= int(in_order.forwards.sum())


def test_runs_of_a_fooled_image_end_in_half_empty_batches_too(
    curved: nn.Module, images: Tensor, y: Tensor
) -> None:
    """One image at a time, whose two runs leave room to speculate."""
    algorithm, eps = FAB(norm="linf", steps=10, runs=2), 0.006
    fooled = 0
    for at in torch.arange(12).split(1):
        in_order = searched(InOrder(algorithm), curved, images[at], y[at], eps)  # type: ignore[arg-type]
        curved.calls.clear()
        found = searched(algorithm, curved, images[at], y[at], eps, batch_size=4)
        assert_same(found, in_order)
        assert sum(curved.calls) == int(found.forwards.sum())
        fooled += int(found.success)
    assert 1 < fooled


def test_each_image_has_its_own_eps(curved: nn.Module, images: Tensor, y: Tensor) -> None:
    eps = torch.linspace(0, 0.1, 12)
    for algorithm in (
        PGD(norm="linf", relative_alpha=0.25, steps=5),
        APGD(norm="linf", steps=5),
        FAB(norm="linf", steps=5),
        Square(norm="linf", steps=10),
    ):
        parts = list(search(curved, algorithm, images, y, eps=eps))
        for part in parts:
            assert bool((part.result.distance <= eps[part.index] + 1e-6).all())
        alone = search(curved, algorithm, images[8:9], y[8:9], eps=eps[8:9])
        (mine,) = (part for part in parts if 8 in part.index)
        row = mine.index.tolist().index(8)
        assert torch.equal(next(alone).result.x_adv[0], mine.result.x_adv[row])


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", [name for name in ATTACKS if name != "autoattack"])
def test_eps_0_is_the_identity(
    curved: nn.Module, images: Tensor, y: Tensor, name: str, norm: Norm
) -> None:
    result = run(name, curved, images, y, 0.0, norm)
    assert torch.equal(result.x_adv, images)
    assert result.success.tolist() == [False] * 11 + [True]


@pytest.mark.parametrize("name", ATTACKS)
def test_misclassified_image_counts_as_a_success(
    curved: nn.Module, images: Tensor, y: Tensor, name: str
) -> None:
    result = run(name, curved, images[-1:], y[-1:], 0.02)
    assert bool(result.success.all())
    if name in ("fgsm", "fab-t", "minimal", "autoattack"):  # they look at the image itself
        assert float(result.distance) == 0


def test_keep_failed_false_returns_the_original_image(
    curved: nn.Module, images: Tensor, y: Tensor
) -> None:
    for algorithm in (
        PGD(norm="linf", relative_alpha=0.25, steps=5, runs=2),
        FAB(norm="linf", steps=5),
    ):
        kept = searched(algorithm, curved, images, y, 0.006)
        bare = searched(algorithm, curved, images, y, 0.006, keep_failed=False)
        assert torch.equal(kept.success, bare.success)
        assert 0 < int(kept.success.sum()) < 12
        assert torch.equal(bare.x_adv[~bare.success], images[~bare.success])
        assert torch.equal(bare.x_adv[bare.success], kept.x_adv[kept.success])
        assert not bool(bare.distance[~bare.success].any())


def test_success_counts_only_if_the_exact_model_is_fooled(
    curved: nn.Module, make_curved: Callable[..., nn.Module], images: Tensor, y: Tensor
) -> None:
    def rough(x: Tensor) -> Tensor:
        return curved(x).round()  # type: ignore[no-any-return]

    exact = make_curved()
    algorithm = Square(norm="linf", steps=60)
    alone = searched(algorithm, rough, images, y, 0.1)
    mistaken = alone.success & (exact(alone.x_adv).argmax(dim=1) == y)
    assert bool(mistaken.any())  # or the test would show nothing
    exact.calls.clear()
    curved.calls.clear()
    checked = searched(algorithm, rough, images, y, 0.1, confirm=exact)
    assert sum(curved.calls) + sum(exact.calls) == int(checked.forwards.sum())
    assert bool((exact(checked.x_adv).argmax(dim=1) != y)[checked.success].all())


def test_uint8_images_equal_their_float_values(
    curved: nn.Module, images: Tensor, y: Tensor
) -> None:
    levels = (images * 255).round().to(torch.uint8)
    algorithm = PGD(norm="linf", relative_alpha=0.25, steps=5)
    whole = searched(algorithm, curved, levels, y, 0.05)
    assert_same(searched(algorithm, curved, levels.float() / 255, y, 0.05), whole, counts=True)


def cpu_allocator(rows: int) -> Exception:
    return RuntimeError(
        f"[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate "
        f"memory: you tried to allocate {rows} bytes."
    )


@pytest.mark.parametrize(
    "failure",
    [lambda rows: torch.OutOfMemoryError("CUDA out of memory"), cpu_allocator, MemoryError],
    ids=["gpu", "cpu", "python"],
)
@pytest.mark.parametrize("name", ["pgd", "apgd-t", "fab-t", "square"])
def test_too_large_a_batch_is_halved(
    curved: nn.Module, images: Tensor, y: Tensor, name: str, failure: Callable[[int], Exception]
) -> None:
    whole = run(name, curved, images, y, 0.05)
    curved.calls.clear()

    def small(x: Tensor) -> Tensor:
        if len(x) > 3:
            raise failure(len(x))
        return curved(x)  # type: ignore[no-any-return]

    assert_same(run(name, small, images, y, 0.05), whole, counts=True)
    assert max(curved.calls) == 3


def test_image_too_large_for_memory_is_reported(images: Tensor, y: Tensor) -> None:
    def hungry(x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        run("pgd", hungry, images, y, 0.05)


class Moody(nn.Module):
    """Parts in different modes, a frozen part, gradients in place; draws from the global state."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)  # with some weights the first pass fools every image
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm, self.held = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.drop, self.head = nn.Dropout(), nn.Linear(4, 5)
        self.train()
        self.held.eval()
        self.head.bias.requires_grad_(False)
        for parameter in self.parameters():
            parameter.grad = torch.ones_like(parameter)
        self.calls, self.fail_at = 0, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        assert not any(module.training for module in self.modules())
        assert not any(parameter.requires_grad for parameter in self.parameters())
        if self.calls == self.fail_at:
            raise KeyError("the model broke")
        x = x + 0 * torch.rand(1)
        logits: Tensor = self.head(self.drop(self.held(self.norm(self.conv(x)))).mean((2, 3)))
        return logits


def snapshot(model: nn.Module) -> list[object]:
    return [
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [parameter.grad.tolist() for parameter in model.parameters() if parameter.grad is not None],
        [value.tolist() for value in model.state_dict().values()],
        torch.get_rng_state().tolist(),
        torch.is_grad_enabled(),
    ]


@pytest.mark.parametrize("fail_at", [0, 1, 2])
@pytest.mark.parametrize("name", ATTACKS)
def test_model_is_unchanged_after_the_search(name: str, fail_at: int, x: Tensor) -> None:
    model = Moody()
    model.fail_at = fail_at
    before = snapshot(model)
    with torch.no_grad():
        y = torch.arange(8) % 5
    if fail_at:
        with pytest.raises(KeyError):
            run(name, model, x, y, 0.001)
    else:
        run(name, model, x, y, 0.001)
    assert model.calls > 0
    assert snapshot(model) == before


def test_model_is_unchanged_between_results(x: Tensor) -> None:
    model = Moody()
    before = snapshot(model)
    algorithm = PGD(norm="linf", relative_alpha=0.25, steps=3)
    y, eps = torch.zeros(8, dtype=torch.int64), torch.full((8,), 0.01)
    iterator: Iterator[Any] = search(model, algorithm, x, y, eps=eps, batch_size=2)
    next(iterator)
    assert snapshot(model) == before
    iterator.close()  # type: ignore[attr-defined]
    assert snapshot(model) == before


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_few_classes(
    make_curved: Callable[..., nn.Module], images: Tensor, classes: int, name: str
) -> None:
    model = make_curved(classes)
    y = model(images).argmax(dim=1)
    if name == "apgd-dlr" and classes == 2:
        with pytest.raises(ValueError, match="at least 3 classes for the loss dlr, got 2"):
            run(name, model, images, y, 0.1)
        return
    result = run(name, model, images, y, 0.15)
    assert torch.equal(model(result.x_adv).argmax(dim=1) != y, result.success)
    assert int(result.success.sum()) > 3
    if name == "apgd-t":  # each other class is tried once, and no class twice
        assert int(result.forwards.max()) <= 1 + 9 * (classes - 1)


def test_targeted_apgd_of_dlr_needs_four_classes(
    make_curved: Callable[..., nn.Module], images: Tensor
) -> None:
    model = make_curved(3)
    y = model(images).argmax(dim=1)
    with pytest.raises(ValueError, match="at least 4 classes"):
        run("apgd-dlr", model, images, y, 0.1, target=(y + 1) % 3)


def test_no_op_algorithm_finds_nothing(curved: nn.Module, images: Tensor, y: Tensor) -> None:
    """What tells a no-op from an attack: the distance, and a real one's successes."""

    class Still(PGD):
        def advance(self, rows: Any, *rest: Any) -> Tensor:
            done = super().advance(rows, *rest)
            rows.x_adv = rows.x
            return done

    settings: dict[str, Any] = {"relative_alpha": 0.25, "steps": 5, "random_start": False}
    still, moving = (
        searched(kind(norm="linf", **settings), curved, images, y, 0.05) for kind in (Still, PGD)
    )
    assert still.success.tolist() == [False] * 11 + [True]
    assert not bool(still.distance.any())
    assert bool(moving.distance[:-1].all())


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (lambda x: [0.0, 1.0], "logits as a tensor, got list"),
        (lambda x: x.flatten(1).sum(dim=1), r"logits \(12, K\) .* got \(12,\)"),
        (lambda x: x.flatten(1)[:, :1], "at least 2 classes"),
        (lambda x: x.flatten(1)[:3], r"got \(3, 108\)"),
        (lambda x: x.flatten(1).long(), "expected float logits, got torch.int64"),
        (lambda x: x.flatten(1).detach(), "a gradient at the images, got none"),
        (lambda x: x.flatten(1).detach() + torch.zeros(1, requires_grad=True), "gradient at the"),
    ],
)
def test_models_that_cannot_be_attacked_are_rejected(
    images: Tensor, y: Tensor, logits: Callable[[Tensor], Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        run("pgd", logits, images, y, 0.05)


def test_model_that_modifies_its_input_is_rejected(images: Tensor, y: Tensor) -> None:
    def careless(x: Tensor) -> Tensor:
        return x.sub_(0.5).flatten(1)

    before = images.clone()
    with pytest.raises(ModelError, match="leaves its images unchanged"):
        run("square", careless, images, y, 0.05)
    assert torch.equal(images, before)


def test_model_whose_class_count_changes_is_rejected(images: Tensor, y: Tensor) -> None:
    calls = []

    def wavering(x: Tensor) -> Tensor:
        calls.append(1)
        return x.flatten(1)[:, : 20 + len(calls)]

    with pytest.raises(ModelError, match="21 classes again, got 22"):
        run("pgd", wavering, images, y, 0.05)


@pytest.mark.parametrize("name", ATTACKS)
def test_out_of_range_labels_are_rejected(curved: nn.Module, images: Tensor, name: str) -> None:
    for label in (10, -1):
        y = torch.full((12,), label)
        with pytest.raises(ValueError, match=r"labels from 0 to 9, .* got (10|-1) to"):
            run(name, curved, images, y, 0.05)
    with pytest.raises(ValueError, match="targets from 0 to 9"):
        run("pgd", curved, images, torch.zeros_like(y), 0.05, target=torch.full((12,), 10))


@pytest.mark.parametrize("batch_size", [0, -1])
def test_empty_batches_are_rejected(
    curved: nn.Module, images: Tensor, y: Tensor, batch_size: int
) -> None:
    with pytest.raises(ValueError, match="batch size of at least 1"):
        run("pgd", curved, images, y, 0.05, batch_size=batch_size)


def test_empty_input_gives_empty_results(curved: nn.Module) -> None:
    none, labels = torch.zeros(0, 3, 6, 6), torch.zeros(0, dtype=torch.int64)
    assert list(search(curved, FAB(norm="l2", steps=5), none, labels, eps=torch.zeros(0))) == []
    assert not curved.calls


def test_nan_logits_are_no_success(curved: nn.Module, images: Tensor, y: Tensor) -> None:
    def broken(x: Tensor) -> Tensor:
        logits = curved(x)
        return torch.where(torch.arange(len(x)).view(-1, 1) == 0, torch.nan, logits)

    alone = run("pgd", broken, images[:1], y[:1], 0.05)
    assert not bool(alone.success.any())
    assert bool(alone.logits.isnan().all())  # as the model gave them, not made up
    for name in ("apgd-t", "fab-t", "square"):
        assert not bool(run(name, broken, images[:1], y[:1], 0.05).success.any())


def test_integers_are_accepted_for_eps(curved: nn.Module, images: Tensor, y: Tensor) -> None:
    threat_model = ThreatModel(norm="l2", eps=1)
    assert bool(pgd(curved, images, y, threat_model=threat_model, alpha=1, steps=2).success.any())
    assert bool(apgd_t(curved, images, y, threat_model=threat_model, steps=2).success.any())


@dataclass(kw_only=True)
class Shown(Table):
    step: Tensor


class Scripted(Algorithm[Shown]):
    """Run r shows (r + 1, step) to the model; a run ends after 10 steps."""

    uses_gradient = False
    needs_clean_logits = True
    allow_parallel_runs = True

    def begin(self, rows: Rows[Shown]) -> Shown:
        self._show(rows, torch.zeros_like(rows.y))
        return Shown(step=torch.zeros_like(rows.y))

    def _show(self, rows: Rows[Shown], step: Tensor) -> None:
        rows.x_adv = rows.x.clone()
        rows.x_adv[:, 0, 0, 0], rows.x_adv[:, 0, 0, 1] = (rows.run + 1) / 8, step / 16

    def loss(self, logits: Tensor, rows: Rows[Shown]) -> Tensor:
        return logits[:, 1] - logits[:, 0]

    def advance(self, rows: Rows[Shown], *rest: Any) -> Tensor:
        rows.state.step = rows.state.step + 1
        self._show(rows, rows.state.step)
        return rows.state.step >= 10


@pytest.mark.parametrize(
    ("falls", "run"),
    [
        ({2: 4}, 2),  # runs 0 and 1 fail first
        ({0: 2}, 0),
        ({0: 6, 1: 3}, 0),  # the lower run wins though it succeeds later
        ({1: 3, 2: 3}, 1),  # of two in one step the lower
        ({}, None),
    ],
)
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_lowest_successful_run_is_returned(
    falls: dict[int, int], run: int | None, batch_size: int
) -> None:
    seen: list[int] = []

    def model(x: Tensor) -> Tensor:
        seen.append(len(x))
        shown = zip((x[:, 0, 0, 0] * 8 - 1).tolist(), (x[:, 0, 0, 1] * 16).tolist(), strict=True)
        fooled = torch.tensor([falls.get(int(r)) == int(s) for r, s in shown])
        return torch.stack([~fooled, fooled, fooled & False, fooled & False], dim=1).float()

    x, y = torch.zeros(1, 1, 2, 2), torch.zeros(1, dtype=torch.int64)
    algorithm = Scripted(norm="linf", steps=10, runs=3)
    (found,) = search(model, algorithm, x, y, eps=torch.ones(1), batch_size=batch_size)
    assert found.result.success.tolist() == [run is not None]
    shown = float(found.result.x_adv[0, 0, 0, 0])
    assert shown == (1 / 8 if run is None else (run + 1) / 8)  # of failed runs the first
    assert sum(seen) == int(found.result.forwards)


@pytest.mark.parametrize("name", [name for name in ATTACKS if name != "fgsm"])  # over too soon
def test_cancelled_images_leave_without_affecting_others(
    curved: nn.Module, images: Tensor, y: Tensor, name: str
) -> None:
    whole = run(name, curved, images, y, 0.003)
    gone = ~whole.success  # they would have stayed to the end
    gone[gone.nonzero()[::2]] = False
    assert 0 < int(gone.sum()) < int((~whole.success).sum())
    asked: list[Tensor] = []

    def cancelled() -> Tensor:
        asked.append(gone & (len(asked) > 0))
        return asked[-1]

    rest = run(name, curved, images, y, 0.003, cancelled=cancelled)
    for field in ("x_adv", "success", "distance"):
        assert torch.equal(getattr(rest, field)[~gone], getattr(whole, field)[~gone])
    assert not bool(rest.success[gone].any())
    assert bool((rest.forwards[gone] <= whole.forwards[gone] / 2).all())
