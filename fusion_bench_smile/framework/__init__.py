"""SMILE in the framework fusion_bench: method, program and task pools. No other package here imports the framework."""

from .errors import exit_on_smile_error
from .method import SmileUpscalingAlgorithm
from .model_pools import calibration_inputs
from .program import IndividualModels, IndividualModelsAlgorithm, ReportingFusionProgram, objective_of

__all__ = [
    "IndividualModels", "IndividualModelsAlgorithm", "ReportingFusionProgram", "SmileUpscalingAlgorithm",
    "calibration_inputs", "exit_on_smile_error", "objective_of",
]  # fmt: skip
