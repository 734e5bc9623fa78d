"""Quantize a model once into one nested checkpoint, run it at any precision.

    import elastiq

    elastiq.quantize("MODEL_DIR", "OUT", elastiq.recipes.nested(levels=(2, 3, 4, 6, 8)))
    model = elastiq.load("OUT", bits=3)
    elastiq.set_bits(model, 6)
"""

from importlib.metadata import version

from . import recipes
from .allocate import Budget, allocate, frontier
from .core import ElastiqError, LevelMap, Recipe
from .inference import generate, load, set_bits
from .integrations.transformers import ElastiqConfig
from .pipeline import plan, quantize

__version__ = version("elastiq")
__all__ = [
    "Budget",
    "ElastiqConfig",
    "ElastiqError",
    "LevelMap",
    "Recipe",
    "__version__",
    "allocate",
    "frontier",
    "generate",
    "load",
    "plan",
    "quantize",
    "recipes",
    "set_bits",
]
