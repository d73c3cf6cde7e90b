"""The entry of a network family in the registry."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from torch import Size, Tensor, nn

if TYPE_CHECKING:
    from robust.graph import FeatureMap, GraphBuilder

Shapes = Mapping[str, Size]


class UnknownLayout(ValueError):
    """A state dict of this family whose network it can't build."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The network that a state dict belongs to, inferred from its keys and shapes."""

    arch: str
    stem: str
    num_classes: int
    variant: str = ""
    activation: str = "relu"  # a guess: not in the keys
    mean: tuple[float, float, float] | None = None  # a guess: what the layout's authors use
    std: tuple[float, float, float] | None = None
    input_size: int = 32  # a guess
    renamed: Mapping[str, str] = field(default_factory=dict)  # key in the file: our key
    unused: tuple[str, ...] = ()  # keys of the file that the network does not use
    layout: str = ""  # the code that the key names are from, if not ours
    doubts: tuple[str, ...] = ()  # other networks with the same keys
    stems: tuple[str, ...] = ()  # stems with the same keys; `stem` is the likeliest


class Build(Protocol):
    """Builds the bare network, images float32 (N, 3, H, W) to logits (N, K)."""

    def __call__(
        self,
        arch: str,
        *,
        num_classes: int,
        stem: str,
        activation: str,
        variant: str,
        input_size: int,
    ) -> nn.Module: ...


@dataclass(frozen=True, kw_only=True)
class Family:
    """A network family. Everything except `archs`, `build` and `head` has a slower fallback."""

    archs: tuple[str, ...]  # names for help and errors; `matches` may accept more
    build: Build
    head: Callable[[nn.Module], str]  # name of the layer that computes the logits
    stems: tuple[str, ...]
    activations: tuple[str, ...] = ("relu", "silu")
    variants: tuple[str, ...] = ("",)
    matches: Callable[[str], bool] | None = None  # by default: one of `archs`
    read: Callable[[Shapes], Reading | None] | None = None  # None: chosen only by name
    norm_pairs: Callable[[nn.Module], Iterator[tuple[str, str]]] | None = None
    """(convolution, batch norm right after it) by name. None: nothing is folded."""
    residual_ends: Callable[[nn.Module], Iterator[Tensor]] | None = None
    """The weight of each residual branch that, set to 0, makes its block the identity."""
    onnx: Callable[[GraphBuilder, Any, FeatureMap], None] | None = None
    """Adds the network to a graph. None: torch's exporter is used."""

    def builds(self, arch: str) -> bool:
        """Whether `arch` names a network of this family."""
        return arch in self.archs if self.matches is None else self.matches(arch)
