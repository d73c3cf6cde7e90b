"""Networks of timm and torchvision, by their own names: ``timm:convnext_tiny``."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from robust.choices import Rgb
from robust.networks.family import Family
from robust.networks.layers import SkipInitialization

PREFIXES = ("timm:", "torchvision:")
# torchvision's networks with auxiliary heads, which compute nothing in eval mode. The pretrained
# ones rescale their input, by an argument that is False without pretrained weights.
_INCEPTIONS = ("googlenet", "inception_v3")
AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """The library's own configuration of a network."""

    mean: Rgb
    std: Rgb
    input_size: int
    head: str  # name of the layer that computes the logits


def library_of(arch: str) -> tuple[str, str]:
    """Library and name. Raises ValueError for an unknown network or a missing library."""
    library, _, name = arch.partition(":")
    if library == "timm":
        try:
            import timm
        except ImportError:
            raise ValueError(
                f"expected the package timm for {arch}, found none: pip install 'robust[timm]'"
            ) from None
        known = timm.is_model(name.split(".")[0])
    else:
        import torchvision

        known = name in torchvision.models.list_models(module=torchvision.models)
    if not known:
        raise ValueError(f"expected a network that {library} has, got {name!r}")
    return library, name


def did_you_mean(arch: str, ours: Sequence[str]) -> str:
    """``; did you mean torchvision:vgg11?`` for a name close to one of these, otherwise empty."""
    import torchvision

    theirs = torchvision.models.list_models(module=torchvision.models)
    name = arch[:40].lower()
    for prefix, known, cutoff in (("torchvision:", theirs, 1.0), ("", ours, 0.6)):
        if close := get_close_matches(name, known, n=1, cutoff=cutoff):
            return f"; did you mean {prefix}{close[0]}?"
    return ""


def build(
    arch: str, *, num_classes: int, stem: str, activation: str, variant: str, input_size: int
) -> nn.Module:
    """The library's network with a head for `num_classes`."""
    library, name = library_of(arch)
    if library == "timm":
        import timm

        net: nn.Module
        if input_size != library_configuration(arch).input_size:
            # Networks with position embeddings need the size; others have no such argument.
            with contextlib.suppress(TypeError):
                net = timm.create_model(name, num_classes=num_classes, img_size=input_size)
                return net
        net = timm.create_model(name, num_classes=num_classes)
        return net
    return _of_torchvision(name, num_classes=num_classes)


def _of_torchvision(name: str, **options: Any) -> nn.Module:
    import torchvision

    if name in _INCEPTIONS:
        options |= {"transform_input": True, "aux_logits": False, "init_weights": True}
    net: nn.Module = torchvision.models.get_model(name, weights=None, **options)
    return net


def other_arguments(arch: str, arguments: Mapping[str, Any]) -> list[str]:
    """Which of timm's `arguments` make another network than `build`, at any size."""
    names = [name for name in arguments if name not in ("num_classes", "img_size")]
    if not names:
        return []
    import timm

    with SkipInitialization():
        net = timm.create_model(library_of(arch)[1])
    defaults: dict[str, Any] = {"in_chans": 3}
    if hasattr(timm.models, "get_model_args"):  # newer versions export all of them
        defaults |= timm.models.get_model_args(net)
    return [name for name in names if arguments[name] != defaults.get(name)]


def library_doubts(arch: str) -> tuple[str, ...]:
    """What the weights do not tell about the network."""
    if arch not in [f"torchvision:{name}" for name in _INCEPTIONS]:
        return ()
    return ("transform_input is assumed to be True, as in torchvision's pretrained network",)


@lru_cache(maxsize=8)
def library_configuration(arch: str) -> Configuration:
    """The library's mean, std and input size of the network, and the name of its head."""
    library, name = library_of(arch)
    if library == "timm":
        import timm

        try:
            known = timm.get_pretrained_cfg(name)
        except RuntimeError:  # an unknown tag, the part after the dot
            known = None
        if known is None:
            raise ValueError(f"expected a network that timm has a configuration of, got {name!r}")
        values: dict[str, Any] = known.to_dict()  # type: ignore[no-untyped-call]
        head = values.get("classifier") or _last_layer(timm.create_model(name))
        return Configuration(
            mean=tuple(values["mean"]),
            std=tuple(values["std"]),
            input_size=values["input_size"][-1],
            head=head if isinstance(head, str) else head[0],
        )
    import torchvision

    with torch.device("meta"):  # only the names of its layers are needed
        net = _of_torchvision(name)
    transform = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    return Configuration(
        mean=tuple(transform.mean),
        std=tuple(transform.std),
        input_size=transform.crop_size[0],
        head=_last_layer(net),
    )


def _last_layer(net: nn.Module) -> str:
    last = ""
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            last = name
    return last


FAMILY = Family(
    archs=(),
    build=build,
    head=_last_layer,
    stems=("own",),
    activations=("own",),
    matches=lambda arch: arch.startswith(PREFIXES),
)
