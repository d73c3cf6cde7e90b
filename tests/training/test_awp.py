import pytest
import torch
from torch import Tensor, nn

from training.awp import perturbed

GAMMA = 0.005


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    )


@pytest.fixture
def x() -> Tensor:
    return torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    labels = torch.arange(len(x)) % 3
    return nn.functional.cross_entropy(model(x), labels)


def test_each_weight_moves_up_its_gradient_by_gamma_times_its_norm(
    model: nn.Module, x: Tensor
) -> None:
    before = copied(model)
    loss = loss_of(model.eval(), x)
    names = ["0.weight", "4.weight"]
    gradients = torch.autograd.grad(loss, [dict(model.named_parameters())[n] for n in names])
    with perturbed(model, lambda: loss_of(model, x), gamma=GAMMA):
        for name, gradient in zip(names, gradients, strict=True):
            delta = model.state_dict()[name] - before[name]
            assert delta.norm().item() == pytest.approx(
                GAMMA * before[name].norm().item(), rel=1e-4
            )
            expected = gradient / gradient.norm()
            assert torch.allclose(delta / delta.norm(), expected, atol=1e-4)
        assert loss_of(model, x) > loss
        assert all(
            torch.equal(value, before[key])
            for key, value in model.state_dict().items()
            if key not in names
        )


def test_weights_are_restored_bit_for_bit_even_after_an_error(model: nn.Module, x: Tensor) -> None:
    before = copied(model)
    with (
        pytest.raises(RuntimeError, match="in the block"),
        perturbed(model, lambda: loss_of(model, x), gamma=GAMMA),
    ):
        raise RuntimeError("in the block")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_gamma_zero_computes_no_loss(model: nn.Module, x: Tensor) -> None:
    before = copied(model)

    def never() -> Tensor:
        raise AssertionError("expected no pass")

    with perturbed(model, never, gamma=0.0):
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_batch_norm_statistics_are_updated_once(model: nn.Module, x: Tensor) -> None:
    model.train()
    norm = model[1]
    with perturbed(model, lambda: loss_of(model, x), gamma=GAMMA):
        assert torch.equal(norm.running_mean, torch.zeros(4))  # type: ignore[arg-type]
        loss_of(model, x).backward()  # type: ignore[no-untyped-call]
        statistics = model[0](x).mean(dim=(0, 2, 3))
    assert torch.allclose(norm.running_mean, 0.1 * statistics)  # type: ignore[arg-type]
    assert norm.num_batches_tracked == 1
    assert norm.track_running_stats


def test_gradient_is_taken_at_the_perturbed_weights(model: nn.Module, x: Tensor) -> None:
    """Also under autocast, which keeps the weights it has cast."""
    model.eval()

    def loss_in_bf16() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss_of(model, x)

    here = loss_in_bf16().item()
    with perturbed(model, loss_in_bf16, gamma=0.5):
        there = loss_in_bf16()
        there.backward()  # type: ignore[no-untyped-call]
        expected = torch.autograd.grad(loss_in_bf16(), model[4].weight)[0]
    assert there.item() > here + 0.1
    assert torch.equal(model[4].weight.grad, expected)  # type: ignore[arg-type]


def test_weight_without_a_gradient_is_unchanged(x: Tensor) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3, bias=False))
    before = copied(model)
    with perturbed(model, lambda: 0 * model(x).sum(), gamma=GAMMA):
        assert torch.equal(model[1].weight, before["1.weight"])
