"""dynnet: image models that spend compute where the input needs it.

Importing it loads nothing but this file; what is used is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dynnet import registration

if TYPE_CHECKING:
    from dynnet import errors as errors
    from dynnet import pruning as pruning
    from dynnet.cascading import cascade
    from dynnet.config import WrapConfig
    from dynnet.consolidating import consolidate
    from dynnet.deploy.exporting import export
    from dynnet.deploy.folding import fold
    from dynnet.evaluation.measurement import measure
    from dynnet.evaluation.timing import latency
    from dynnet.evaluation.verification import verify
    from dynnet.files.checkpoints import load, save
    from dynnet.gates.plan import GateConfig
    from dynnet.learning.losses import loss
    from dynnet.model import DynamicModel
    from dynnet.outputs import Prediction
    from dynnet.pruning.channels import prune
    from dynnet.thresholds.calibration import calibrate
    from dynnet.wrapping import wrap
    from dynnet.zoo import create_model, list_models

__version__ = "0.2.0"

__all__ = [
    "DynamicModel",
    "GateConfig",
    "Prediction",
    "WrapConfig",
    "calibrate",
    "cascade",
    "consolidate",
    "create_model",
    "errors",
    "export",
    "fold",
    "latency",
    "list_models",
    "load",
    "loss",
    "measure",
    "prune",
    "pruning",
    "save",
    "verify",
    "wrap",
]

_HOMES = {
    "DynamicModel": "model",
    "GateConfig": "gates.plan",
    "Prediction": "outputs",
    "WrapConfig": "config",
    "calibrate": "thresholds.calibration",
    "cascade": "cascading",
    "consolidate": "consolidating",
    "create_model": "zoo",
    "export": "deploy.exporting",
    "fold": "deploy.folding",
    "latency": "evaluation.timing",
    "list_models": "zoo",
    "load": "files.checkpoints",
    "loss": "learning.losses",
    "measure": "evaluation.measurement",
    "prune": "pruning.channels",
    "save": "files.checkpoints",
    "verify": "evaluation.verification",
    "wrap": "wrapping",
}

# Names of version 0.1, and what to write in their place.
_RENAMED = {
    "Boundary": "dynnet.exits.boundaries.Boundary",
    "Calibration": "dynnet.thresholds.calibration.Calibration",
    "ExitOutputs": "dynnet.outputs.ExitOutputs",
    "Latency": "dynnet.evaluation.timing.Latency",
    "Measurement": "dynnet.evaluation.measurement.Measurement",
    "backbones": 'timm.create_model("cifar_resnet20")',
    "load_backbone": "dynnet.load, which gives whatever the file holds",
    "quantize": "dynnet.export(model, folder, int8=True, loader=loader)",
    "unwrap": "model.unwrap()",
}

registration.when_timm_is_there()


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        found = getattr(importlib.import_module(f"dynnet.{_HOMES[name]}"), name)
    elif name in ("errors", "pruning", "zoo"):
        found = importlib.import_module(f"dynnet.{name}")
    elif name in _RENAMED:
        # `from dynnet import ...` would swallow the words of an AttributeError.
        raise ImportError(f"dynnet.{name} of version 0.1 is gone; write {_RENAMED[name]}")
    else:
        raise AttributeError(f"module 'dynnet' has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
