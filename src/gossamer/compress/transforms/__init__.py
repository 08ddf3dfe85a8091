"""Changes of a model that keep its function and make its weights or inputs easier to quantize."""

from gossamer.compress.transforms.awq import awq_scales
from gossamer.compress.transforms.base import PLACES, Migrate, Transform, apply_all
from gossamer.compress.transforms.bias import CorrectBias, mean_error
from gossamer.compress.transforms.equalise import equalise
from gossamer.compress.transforms.keys import BalanceKeys, smooth_attention
from gossamer.compress.transforms.online import OnlineHadamard, OnlineOrder, OnlineScale
from gossamer.compress.transforms.permute import OrderChannels, OrderStream, sort_channels
from gossamer.compress.transforms.ranges import moved
from gossamer.compress.transforms.rescale import rescale
from gossamer.compress.transforms.rotate import FoldNorms, RotateStream, RotateValues, rotate_values
from gossamer.compress.transforms.smooth import Quantize, smooth, smooth_outliers, smooth_searched

__all__ = [
    "PLACES",
    "BalanceKeys",
    "CorrectBias",
    "FoldNorms",
    "Migrate",
    "OnlineHadamard",
    "OnlineOrder",
    "OnlineScale",
    "OrderChannels",
    "OrderStream",
    "Quantize",
    "RotateStream",
    "RotateValues",
    "Transform",
    "apply_all",
    "awq_scales",
    "equalise",
    "mean_error",
    "moved",
    "rescale",
    "rotate_values",
    "smooth",
    "smooth_attention",
    "smooth_outliers",
    "smooth_searched",
    "sort_channels",
]
