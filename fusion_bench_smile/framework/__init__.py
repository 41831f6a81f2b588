"""SMILE in the framework fusion_bench: method, program and task pools. No other package here imports the framework."""

from .calibration_data import calibration_inputs
from .errors import exit_on_smile_error
from .individual import IndividualModels, IndividualModelsAlgorithm
from .method import SmileUpscalingAlgorithm
from .program import ReportingFusionProgram, objective_of

__all__ = [
    "IndividualModels", "IndividualModelsAlgorithm", "ReportingFusionProgram", "SmileUpscalingAlgorithm",
    "calibration_inputs", "exit_on_smile_error", "objective_of",
]  # fmt: skip
