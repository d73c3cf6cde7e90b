"""Network architectures: one file per family, and their registry."""

from robust.networks.family import Family, Reading, Shapes, UnknownLayout
from robust.networks.library import library_configuration
from robust.networks.registry import (
    ACTIVATIONS,
    ARCHS,
    FAMILIES,
    STEMS,
    build,
    check_choices,
    family_of,
    read_layout,
)
from robust.networks.sides import convolution_sides

__all__ = [
    "ACTIVATIONS",
    "ARCHS",
    "FAMILIES",
    "STEMS",
    "Family",
    "Reading",
    "Shapes",
    "UnknownLayout",
    "build",
    "check_choices",
    "convolution_sides",
    "family_of",
    "library_configuration",
    "read_layout",
]
