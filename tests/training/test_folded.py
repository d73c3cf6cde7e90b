from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from robust.classifier import Architecture, Classifier
from robust.networks import FAMILIES, family_of
from tests.support import small
from training.folded import FoldedCopy
from training.recipe import AdversarialPart, Phase
from training.step import Trainer

# One of each family whose norms can be folded; a smaller one where there is.
SMALLER = {"wide_resnet28_10": "wide_resnet10_1"}
FIRST = [family.archs[0] for family in FAMILIES if family.norm_pairs is not None]
ARCHS = [SMALLER.get(arch, arch) for arch in FIRST]


def trained(arch: str) -> Classifier:
    """A classifier whose norms are far from the identity, as after training."""
    torch.manual_seed(0)
    stem = family_of(arch).stems[0]
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    model = Classifier(
        Architecture(arch=arch, stem=stem, num_classes=3, input_size=16, mean=mean, std=std)
    )
    disturb(model)
    return model


def disturb(model: nn.Module) -> None:
    with torch.no_grad():
        for norm in norms_of(model):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.uniform_(-0.2, 0.2)
            norm.running_mean.uniform_(-0.2, 0.2)  # type: ignore[union-attr]
            norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]


def norms_of(model: nn.Module) -> Iterator[_BatchNorm]:
    return (module for module in model.modules() if isinstance(module, _BatchNorm))


def logits_and_gradient(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_(True)
    logits = model(x)
    weights = torch.tensor([1.0, -2.0, 0.5])
    return logits.detach(), torch.autograd.grad((logits * weights).sum(), x)[0]


@pytest.mark.parametrize("arch", ARCHS)
def test_refreshed_copy_matches_the_current_model(arch: str) -> None:
    model = trained(arch)
    folded = FoldedCopy(model, torch.float32)
    x = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    disturb(model)  # as steps of training do
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    stale = logits_and_gradient(folded, x)
    folded.refresh()
    model.eval()
    for mine, theirs, old in zip(
        logits_and_gradient(folded, x), logits_and_gradient(model, x), stale, strict=True
    ):
        size = theirs.abs().max()
        assert (mine - theirs).abs().max() < 1e-4 * size
        assert (old - theirs).abs().max() > 1e-2 * size
    assert sum(1 for _ in norms_of(folded)) < sum(1 for _ in norms_of(model))


def test_sync_batch_norms_are_folded() -> None:
    """As on several GPUs; in eval mode they also run on a CPU."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(trained(ARCHS[0]))  # type: ignore[no-untyped-call]
    folded = FoldedCopy(model, torch.float32)
    x = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    disturb(model)
    folded.refresh()
    expected = model.eval()(x)
    assert (folded(x) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_copy_shares_no_memory_and_has_no_gradients() -> None:
    model = trained(ARCHS[0]).train()
    folded = FoldedCopy(model, torch.float32)
    theirs = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert not theirs & {tensor.data_ptr() for tensor in folded.net.state_dict().values()}
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    assert all(module.training for module in model.modules())
    assert not any(module.training for module in folded.net.modules())


def test_bfloat16_weights_give_float32_logits_close_to_the_models() -> None:
    model = trained("resnet18")
    folded = FoldedCopy(model, torch.bfloat16)
    assert folded.net.get_parameter("conv1.weight").dtype == torch.bfloat16
    x = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    mine, gradient = logits_and_gradient(folded, x)
    theirs, exact = logits_and_gradient(model.eval(), x)
    assert (mine.dtype, gradient.dtype) == (torch.float32, torch.float32)
    assert (mine - theirs).abs().max() < 0.05 * theirs.abs().max()
    agree = (gradient.sign() == exact.sign()).float().mean()
    assert agree > 0.9


def test_family_without_foldable_pairs_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    family = type("Family", (), {"norm_pairs": None})
    monkeypatch.setattr("training.folded.family_of", lambda arch: family)
    with pytest.raises(ValueError, match="expected a family with norm_pairs, got resnet18"):
        FoldedCopy(trained("resnet18"), torch.float32)


def test_step_refreshes_only_the_copies_it_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    attacked = (AdversarialPart(kind="fgsm"),)
    phases = (
        Phase(name="clean", epochs=1),
        Phase(name="taught", epochs=1, teacher=0.5),
        Phase(name="attacked", epochs=1, parts=attacked),
        Phase(name="both", epochs=1, parts=attacked, teacher=0.5),
    )
    recipe = replace(small.tiny(), phases=phases)
    colors = small.colors()
    model = Classifier(
        Architecture(arch=recipe.arch, stem=recipe.stem, num_classes=4, input_size=16)
    )
    trainer = Trainer(model, recipe, device=torch.device("cpu"))
    refreshed: list[object] = []
    monkeypatch.setattr(FoldedCopy, "refresh", lambda copy: refreshed.append(copy))
    for phase in phases:
        generator = torch.Generator().manual_seed(0)
        x, targets, _ = trainer.prepare(colors.images[:4], colors.labels[:4], phase, generator)
        trainer.attack(x, targets, phase, generator)
    attack, teacher = trainer.attack_copy, trainer.teacher_copy
    assert refreshed == [teacher, attack, attack, teacher]
