"""An adversarially robust image classifier: train, attack, measure and serve it.

import robust

model = robust.load_model("models/robust_model.pt")
print(robust.evaluate(model, images, labels, attacks=["pgd-20", "autoattack"], eps="8/255"))
x_adv = robust.attack(model, images, labels, "apgd-t", eps=8 / 255).x_adv
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robust.api import attack as attack
    from robust.api import evaluate as evaluate
    from robust.attacks import AttackResult as AttackResult
    from robust.checkpoint import load_model as load_model
    from robust.datasets import load_dataset as load_dataset
    from robust.evaluation import Evaluation as Evaluation
    from robust.threat_model import ThreatModel as ThreatModel

    __version__: str

# Imported when first used: the command line starts without torch.
_PUBLIC = {
    "AttackResult": "robust.attacks",
    "Evaluation": "robust.evaluation",
    "ThreatModel": "robust.threat_model",
    "attack": "robust.api",
    "evaluate": "robust.api",
    "load_dataset": "robust.datasets",
    "load_model": "robust.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from robust.environment import project_version

        return project_version()
    if name not in _PUBLIC:
        raise AttributeError(f"module 'robust' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    modules = [name for name, value in globals().items() if isinstance(value, ModuleType)]
    return sorted([*_PUBLIC, "__version__", *modules])
