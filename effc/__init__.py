"""effc: an efficiency compiler for neural networks.

result = effc.optimize("model.onnx", "simplify,fold-batchnorm,int8", calibrate="train.yaml", evaluate="test.yaml")
effc.save(result.model, "model-effc.onnx")
"""

__version__ = "0.1.0"

from effc.api import Result, optimize
from effc.capture import capture, load
from effc.contract import Context, Pass, Proposal, Repeat, Skipped
from effc.data import DataSpec
from effc.errors import BadInput, EffcError, InvalidModel, PassFailed, RequirementNotMet
from effc.graphsurgeon import graphsurgeon_pass
from effc.history import History
from effc.model import Model
from effc.save import save
from effc.target import Target

__all__ = [
    "BadInput",
    "Context",
    "DataSpec",
    "EffcError",
    "History",
    "InvalidModel",
    "Model",
    "Pass",
    "PassFailed",
    "Proposal",
    "Repeat",
    "RequirementNotMet",
    "Result",
    "Skipped",
    "Target",
    "capture",
    "graphsurgeon_pass",
    "load",
    "optimize",
    "save",
]
