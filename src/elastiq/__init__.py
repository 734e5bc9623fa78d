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
from .generate import generate
from .huggingface import ElastiqConfig
from .load import load, set_bits
from .planning import plan
from .quantize import quantize

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
