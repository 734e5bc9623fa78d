"""What every matrix loses at every level."""

from .block_change import BlockChange
from .correlation import CanonicalCorrelation
from .decoupled import Decoupled
from .fisher import EmpiricalFisher
from .gradient import GradientMagnitude
from .hessian import HessianEigenvalue, HessianTrace
from .kl import EndToEndKL
from .output_error import OutputError
from .pruning import PruningSensitivity
from .sampled_fisher import SampledFisher
from .spectral_energy import SpectralEnergy
from .spikes import ActivationSpikes
from .taylor import TaylorTerm
from .weight_outliers import WeightOutliers

__all__ = [
    "ActivationSpikes",
    "BlockChange",
    "CanonicalCorrelation",
    "Decoupled",
    "EmpiricalFisher",
    "EndToEndKL",
    "GradientMagnitude",
    "HessianEigenvalue",
    "HessianTrace",
    "OutputError",
    "PruningSensitivity",
    "SampledFisher",
    "SpectralEnergy",
    "TaylorTerm",
    "WeightOutliers",
]
