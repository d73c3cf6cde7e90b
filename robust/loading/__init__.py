"""Loads models of other formats: weights files, folders, code, exported graphs, services."""

from robust.loading.errors import CheckpointError
from robust.loading.options import ModelOptions

__all__ = ["CheckpointError", "ModelOptions"]
