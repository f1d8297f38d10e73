"""dynnet: image models that spend compute where the input needs it."""

from dynnet import zoo
from dynnet.deploy.folding import fold
from dynnet.deploy.int8 import quantize
from dynnet.evaluation.measurement import Measurement, measure
from dynnet.evaluation.timing import Latency, latency
from dynnet.exits.boundaries import Boundary
from dynnet.files.checkpoints import load, load_backbone, save
from dynnet.gates.plan import GateConfig
from dynnet.learning import backbones
from dynnet.model import DynamicModel, ExitOutputs, Prediction
from dynnet.pruning import prune
from dynnet.thresholds.calibration import Calibration, calibrate
from dynnet.wrapping import unwrap, wrap

__version__ = "0.1.0"

__all__ = [
    "Boundary",
    "Calibration",
    "DynamicModel",
    "ExitOutputs",
    "GateConfig",
    "Latency",
    "Measurement",
    "Prediction",
    "backbones",
    "calibrate",
    "fold",
    "latency",
    "load",
    "load_backbone",
    "measure",
    "prune",
    "quantize",
    "save",
    "unwrap",
    "wrap",
    "zoo",
]
