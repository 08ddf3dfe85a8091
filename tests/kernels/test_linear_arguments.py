"""What linear kernels refuse and how a level is chosen: a wrong argument is an error, no crash and no silent copy."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from gossamer.errors import UsageError
from gossamer.formats import ArraySource, Packed, encode, parse_weight

kernels = pytest.importorskip("gossamer._kernels")
ops = pytest.importorskip("gossamer.ops")

LEVELS = kernels.isa_supported()


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def packed(text="int4/g32", rows=20, cols=40):
    return encode(parse_weight(text), ArraySource(normal(rows, cols)))


def make(packed, bias=None):
    return ops.make_weight(packed.format.kernel(packed.arrays, *packed.shape), *packed.shape, bias)


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def test_nothing_to_do():
    weight = make(packed())
    ops.linear(zeros(0, 40), [weight], [zeros(0, 20)], "int8/token")
    ops.linear(np.zeros((2, 40), np.float32), [], [], "f32")
    ops.decode_rows(weight, np.empty(0, np.int64), zeros(0, 40))


def frozen(a):
    a.flags.writeable = False
    return a


@pytest.mark.parametrize(
    ("x", "out", "kind"),
    [
        (zeros(2, 41), zeros(2, 20), "f32"),
        (zeros(2, 40), zeros(2, 21), "f32"),
        (zeros(2, 40), zeros(3, 20), "f32"),
        (zeros(2, 40), zeros(20, 2), "f32"),
        (zeros(40), zeros(1, 20), "f32"),
        (zeros(1, 2, 40), zeros(2, 20), "f32"),
        (zeros(2, 40), zeros(40), "f32"),
        (zeros(2, 40, dtype=np.float64), zeros(2, 20), "f32"),
        (zeros(2, 40, dtype=np.float16), zeros(2, 20), "f32"),
        (zeros(2, 40, dtype=np.int32), zeros(2, 20), "f32"),
        (zeros(2, 40), zeros(2, 20, dtype=np.float64), "f32"),
        (zeros(2, 80)[:, ::2], zeros(2, 20), "f32"),
        (zeros(40, 2).T, zeros(2, 20), "f32"),
        (zeros(2, 40), zeros(2, 40)[:, ::2], "f32"),
        (zeros(2, 40), zeros(20, 2).T, "f32"),
        (zeros(2, 40), frozen(zeros(2, 20)), "f32"),
        (zeros(2, 40).tolist(), zeros(2, 20), "f32"),
        (zeros(2, 40), zeros(2, 20).tolist(), "f32"),
        (None, zeros(2, 20), "f32"),
        (zeros(2, 40), None, "f32"),
        (zeros(2, 40), zeros(2, 20), "f64"),
        (zeros(2, 40), zeros(2, 20), ""),
        (zeros(2, 40), zeros(2, 20), None),
    ],
)
def test_wrong_arguments_of_linear(x, out, kind):
    """An array is never converted silently: an output that was would stay empty."""
    weight = make(packed())
    with pytest.raises((ValueError, TypeError)):
        ops.linear(x, [weight], [out], kind)


def test_wrong_lists_of_linear():
    weight, dense = make(packed()), make(packed("f32"))
    x, out = zeros(2, 40), zeros(2, 20)
    short = [([weight], []), ([], [out]), ([weight, weight], [out])]
    for weights, outs in [*short, ([None], [out]), ([1], [out]), (weight, out), (None, None)]:
        with pytest.raises((ValueError, TypeError)):
            ops.linear(x, weights, outs, "f32")
    with pytest.raises(ValueError, match="int8 inputs need integer codes"):
        ops.linear(x, [dense], [out], "int8/token")


@pytest.mark.parametrize(
    ("ids", "out"),
    [
        (np.array([20]), zeros(1, 40)),
        (np.array([-1]), zeros(1, 40)),
        (np.array([2**40]), zeros(1, 40)),
        (np.array([0, 1]), zeros(1, 40)),
        (np.array([0]), zeros(1, 39)),
        (np.array([0]), zeros(40)),
        (np.array([[0]]), zeros(1, 40)),
        (np.array([0], np.int32), zeros(1, 40)),
        (np.array([0.0]), zeros(1, 40)),
        (np.array([0, 1, 2])[::2], zeros(2, 40)),
        (np.array([0]), zeros(1, 40, dtype=np.float64)),
        (np.array([0]), zeros(1, 80)[:, ::2]),
        ([0], zeros(1, 40)),
    ],
)
def test_wrong_arguments_of_decode_rows(ids, out):
    weight = make(packed())
    with pytest.raises((ValueError, TypeError)):
        ops.decode_rows(weight, ids, out)


def kernel(**changes):
    """A sound uint4/g32 of 20 x 40, changed."""
    sound = packed("uint4/g32")
    return ops.Kernel(**{**vars(sound.format.kernel(sound.arrays, 20, 40)), **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"code": "u3"},
        {"scale": "f64"},
        {"scale": "none"},
        {"offset": "zero_u2"},
        {"codes": np.zeros(16, np.uint8)},
        {"codes": np.zeros((2, 4096), np.uint8)},
        {"codes": np.zeros(1 << 14, np.uint8)[::2]},
        {"scales": None},
        {"scales": np.zeros(2, np.float16)},
        {"offsets": None},
        {"offsets": np.zeros(4, np.uint8)},
        {"group": 0},
        {"group": -32},
        {"group": 12},
        {"group": 8},  # needs more scales
        {"group": (1 << 63) - 8},
        {"code": "u5"},  # needs the fifth bits
        {"code": "f32"},  # takes no scale
    ],
)
def test_a_weight_that_would_be_read_past_its_end_is_refused(changes):
    with pytest.raises((ValueError, TypeError)):
        ops.make_weight(kernel(**changes), 20, 40)


SHAPES = [(0, 40), (20, 0), (-1, 40), (20, -8), (36, 40), (20, 4000)]
OVERFLOWING = [(1 << 40, 1 << 27), (1 << 40, 1 << 31), (1 << 62, 1), (1, 1 << 62)]


@pytest.mark.parametrize(("rows", "cols"), SHAPES + OVERFLOWING)
def test_shapes_that_the_arrays_do_not_fill_are_refused(rows, cols):
    """The byte counts of the largest do not fit 64 bits."""
    ops.make_weight(kernel(), 20, 40)
    for sound in (kernel(), ops.Kernel("f32", np.zeros(64, np.float32))):
        with pytest.raises(ValueError):
            ops.make_weight(sound, rows, cols)


def test_a_bias_needs_one_value_per_row():
    with pytest.raises(ValueError, match="one value per row"):
        ops.make_weight(kernel(), 20, 40, zeros(19))


def test_arrays_live_as_long_as_the_weight():
    ours, bias, x = packed(), normal(20), normal(2, 40)
    wanted, out = zeros(2, 20), zeros(2, 20)
    ops.linear(x, [make(ours, bias)], [wanted], "f32")
    weight = make(Packed(ours.format, ours.shape, {n: a.copy() for n, a in ours.arrays.items()}), bias.copy())
    _churn = [np.full(5000, 255, np.uint8) for _ in range(50)]
    ops.linear(x, [weight], [out], "f32")
    assert out.tobytes() == wanted.tobytes()


# ------------------------------------------------------------ choice of level


def test_set_isa_and_threads_refuse_what_is_not_there():
    before = ops.isa()
    for name in ("avx9000", "", "AVX2", "scalar "):
        with pytest.raises(UsageError, match=f"instruction set '{name}' is not one this machine runs; it has scalar"):
            ops.set_isa(name)
    assert ops.isa() == before
    for n in (0, -1, 257):
        with pytest.raises(UsageError, match="choose 1 to 256"):
            ops.set_threads(n)


IMPORT = """
import sys
from gossamer.errors import UsageError
try:
    from gossamer import ops
except UsageError as error:
    sys.exit(str(error))
print(ops.isa())
"""


def import_with(**environment):
    path = os.pathsep.join(p for p in sys.path if p)  # the package is found where this process found it
    variables = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run([sys.executable, "-c", IMPORT], env=variables, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("level", LEVELS)
def test_the_environment_forces_a_level(level):
    done = import_with(GOSSAMER_ISA=level)
    assert (done.returncode, done.stdout) == (0, f"{level}\n")


def test_an_empty_environment_variable_is_none():
    assert import_with(GOSSAMER_ISA="").stdout == f"{LEVELS[-1]}\n"


def test_a_wrong_level_in_the_environment_is_one_sentence():
    done = import_with(GOSSAMER_ISA="sse2")
    assert done.returncode == 1
    assert done.stderr == (
        "GOSSAMER_ISA is set wrongly: instruction set 'sse2' is not one this machine runs; "
        f"it has {', '.join(LEVELS)}.\n"
    )
