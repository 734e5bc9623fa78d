"""Changes of a model while it is read that leave its function as it is, one file per method."""

from .residual_rotation import ResidualRotation

__all__ = ["ResidualRotation"]
