"""Network architectures: one file per family, and their registry."""

from robust.networks.family import Family, Reading, Shapes, UnknownLayout
from robust.networks.library import (
    AUXILIARY,
    library_configuration,
    library_doubts,
    other_arguments,
)
from robust.networks.registry import (
    ARCHS,
    FAMILIES,
    build,
    check_choices,
    family_of,
    read_layout,
)
from robust.networks.sides import convolution_sides

__all__ = [
    "ARCHS",
    "AUXILIARY",
    "FAMILIES",
    "Family",
    "Reading",
    "Shapes",
    "UnknownLayout",
    "build",
    "check_choices",
    "convolution_sides",
    "family_of",
    "library_configuration",
    "library_doubts",
    "other_arguments",
    "read_layout",
]
