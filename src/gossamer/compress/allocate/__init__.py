"""Which format each site gets. Every allocator is a pure function of sites, errors, costs and a budget.

uniform, by_role    one expression for all, or by role and name
salience            the most salient output rows of the whole model in more bits
budget              the least predicted loss within bytes and seconds, from measured candidates
finequant           a group size for each matrix
wide_groups         a fixed number of wide groups of columns in every aligned block
"""

from gossamer.compress.allocate.budget import Candidate, Solution, budget
from gossamer.compress.allocate.by_role import ROLES, by_role, settle, uniform
from gossamer.compress.allocate.groups import aligned, finequant, group_scores, group_size, wide_groups
from gossamer.compress.allocate.latency import site_latency, tokens_per_second
from gossamer.compress.allocate.loss import output_error, packed_bytes, second_order
from gossamer.compress.allocate.salience import Allocation, Level, row_salience, salience

__all__ = [
    "ROLES",
    "Allocation",
    "Candidate",
    "Level",
    "Solution",
    "aligned",
    "budget",
    "by_role",
    "finequant",
    "group_scores",
    "group_size",
    "output_error",
    "packed_bytes",
    "row_salience",
    "salience",
    "second_order",
    "settle",
    "site_latency",
    "tokens_per_second",
    "uniform",
    "wide_groups",
]
