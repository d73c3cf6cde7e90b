"""A report on a checkpoint: a document from a run and evaluations, as HTML and PDF.

Needs the extra ``report`` (matplotlib and fpdf2), see `require_extra`.
"""

from importlib.util import find_spec

PACKAGES = {"matplotlib": "matplotlib", "fpdf2": "fpdf"}


def require_extra() -> None:
    """Raise ValueError that says how to install the extra ``report`` if it is missing."""
    missing = [name for name, module in PACKAGES.items() if find_spec(module) is None]
    if missing:
        raise ValueError(
            f"expected the packages matplotlib and fpdf2, found no {' and no '.join(missing)}: "
            "pip install 'robust[report]'"
        )
