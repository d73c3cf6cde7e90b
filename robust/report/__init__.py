"""A report on a checkpoint: a document from a run and evaluations, as HTML and as PDF.

Needs the extra ``report`` (matplotlib and fpdf2); `require_extra` says so where it is missing.
"""

from importlib.util import find_spec

PACKAGES = {"matplotlib": "matplotlib", "fpdf2": "fpdf"}


def require_extra() -> None:
    """Raise ValueError, saying how to install it, where the extra ``report`` is missing."""
    missing = [name for name, module in PACKAGES.items() if find_spec(module) is None]
    if missing:
        raise ValueError(
            f"expected the packages matplotlib and fpdf2, found no {' and no '.join(missing)}: "
            "pip install 'robust[report]'"
        )
