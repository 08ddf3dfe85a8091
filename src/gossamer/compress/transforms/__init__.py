"""Changes of a model that keep its function and make its weights or inputs easier to quantize."""

from gossamer.compress.transforms.base import Migrate, Transform, apply_all
from gossamer.compress.transforms.rescale import rescale

__all__ = ["Migrate", "Transform", "apply_all", "rescale"]
