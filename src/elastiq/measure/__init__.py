"""What needs the model to be run: sensitivities, damage of whole maps, times of kernels."""

from .bench import Bench
from .inspection import inspect_checkpoint, inspect_model
from .latency import latency_table
from .sensitivity import measure_sensitivity
from .verify import Verdict, allocate_measured

__all__ = [
    "Bench",
    "Verdict",
    "allocate_measured",
    "inspect_checkpoint",
    "inspect_model",
    "latency_table",
    "measure_sensitivity",
]
