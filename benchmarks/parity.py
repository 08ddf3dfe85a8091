"""Logit parity with transformers, architecture by architecture: the comparisons of tests/models/test_parity.py.

    python benchmarks/parity.py [--quick] [--write]

Prints the table; ``--write`` also puts it into docs/parity.md. Takes about a minute and 5 GB of memory, and needs the
development extras and the packages of both real models.
"""

from __future__ import annotations

import argparse
import platform
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "models"))

import oracle
import torch
import transformers
from tiny_models import TINY

from _tables import replace
from gossamer import ops
from gossamer.checkpoints.names import resolve

DOCUMENT = Path(__file__).parents[1] / "docs" / "parity.md"


def rows(quick: bool) -> list[oracle.Row]:
    found = []
    if not quick:
        found += [*oracle.smollm2_rows(resolve("smollm2-135m")), *oracle.gemma3_rows(resolve("gemma3-270m"))]
    for tiny in TINY:
        found += oracle.tiny_rows(tiny)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/parity.md")
    parser.add_argument("--quick", action="store_true", help="leave the two real models out")
    options = parser.parse_args()
    if options.quick and options.write:
        parser.error("--quick leaves rows of the document out: give one of --quick and --write")
    found = rows(options.quick)
    table = oracle.table(found)
    about = (
        f"transformers {transformers.__version__}, torch {torch.__version__}, {platform.machine()}, "
        f"kernels `{ops.isa()}`. Greedy tokens: of {len(found) * oracle.STEPS} steps, "
        f"{sum(r.clear for r in found) / len(found):.1%} had a lead above {oracle.MARGIN:g}."
    )
    print(table, about, sep="\n\n")
    if not all(r.chunked for r in found):
        raise SystemExit("a prompt in uneven chunks gave other logits than in one go")
    if options.write:
        replace(DOCUMENT, "parity", f"{table}\n\n{about}")


if __name__ == "__main__":
    main()
