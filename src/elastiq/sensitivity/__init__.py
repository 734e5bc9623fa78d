"""What every matrix loses at every level."""

from .output_error import OutputError

__all__ = ["OutputError"]
