"""Solvers: the values of a matrix in one format. Pure functions of arrays; nothing here reads files or models."""

from gossamer.compress.solvers.grid import Grid
from gossamer.compress.solvers.hqq import Hqq, hqq
from gossamer.compress.solvers.nearest import clip, nearest
from gossamer.compress.solvers.obs import Obs, Solved, group_metric, obs
from gossamer.compress.solvers.outliers import OutlierRule
from gossamer.compress.solvers.rounding import objective, refit_scales, round_learned
from gossamer.compress.solvers.search import Search, fit_grid

__all__ = [
    "Grid",
    "Hqq",
    "Obs",
    "OutlierRule",
    "Search",
    "Solved",
    "clip",
    "fit_grid",
    "group_metric",
    "hqq",
    "nearest",
    "objective",
    "obs",
    "refit_scales",
    "round_learned",
]
