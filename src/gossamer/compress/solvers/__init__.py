"""Solvers: the values of a matrix in one format. Pure functions of arrays; nothing here reads files or models."""

from gossamer.compress.solvers.grid import Grid
from gossamer.compress.solvers.nearest import clip, nearest
from gossamer.compress.solvers.obs import Obs, Solved, group_metric, obs
from gossamer.compress.solvers.outliers import OutlierRule
from gossamer.compress.solvers.search import Search, fit_grid

__all__ = [
    "Grid",
    "Obs",
    "OutlierRule",
    "Search",
    "Solved",
    "clip",
    "fit_grid",
    "group_metric",
    "nearest",
    "obs",
]
