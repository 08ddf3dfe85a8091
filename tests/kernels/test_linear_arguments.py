"""What linear kernels refuse and how a level is chosen: a wrong argument is an error, no crash and no silent copy."""

from __future__ import annotations

import gc
import os
import subprocess
import sys

import numpy as np
import pytest

from gossamer.errors import UsageError
from gossamer.formats import ArraySource, Packed, encode, parse_input, parse_weight

kernels = pytest.importorskip("gossamer._kernels")
ops = pytest.importorskip("gossamer.ops")

from linear_reference import input_of, make, moved, run, site  # noqa: E402

LEVELS = kernels.isa_supported()
BF16 = ops.Input("bf16", 0, 0.0, 0.0)
WRONG = (ValueError, TypeError)


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def packed(text="int4/g32", rows=20, cols=40):
    return encode(parse_weight(text), ArraySource(normal(rows, cols)))


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def uints(*values):
    return np.array(values, np.uint32)


def plain_site(text="int4/g32", rows=20, cols=40):
    return site(make(packed(text, rows, cols)), parse_input("bf16"))


def frozen(a):
    a.flags.writeable = False
    return a


# ------------------------------------------------------------ the call


@pytest.mark.parametrize(
    ("x", "out"),
    [
        (zeros(2, 41), zeros(2, 20)),
        (zeros(2, 40), zeros(2, 21)),
        (zeros(2, 40), zeros(3, 20)),
        (zeros(2, 40), zeros(20, 2)),
        (zeros(40), zeros(1, 20)),
        (zeros(1, 2, 40), zeros(2, 20)),
        (zeros(2, 40), zeros(40)),
        (zeros(2, 40, dtype=np.float64), zeros(2, 20)),
        (zeros(2, 40, dtype=np.float16), zeros(2, 20)),
        (zeros(2, 40, dtype=np.int32), zeros(2, 20)),
        (zeros(2, 40, dtype=">f4"), zeros(2, 20)),
        (zeros(2, 40), zeros(2, 20, dtype=np.float64)),
        (zeros(2, 80)[:, ::2], zeros(2, 20)),
        (zeros(40, 2).T, zeros(2, 20)),
        (zeros(2, 40), zeros(2, 40)[:, ::2]),
        (zeros(2, 40), zeros(20, 2).T),
        (zeros(2, 40), frozen(zeros(2, 20))),
        (moved(zeros(80), 1).reshape(2, 40), zeros(2, 20)),
        (zeros(2, 40), moved(zeros(40), 2).reshape(2, 20)),
        (zeros(2, 40).tolist(), zeros(2, 20)),
        (zeros(2, 40), zeros(2, 20).tolist()),
        (None, zeros(2, 20)),
        (zeros(2, 40), None),
    ],
)
def test_wrong_arrays(x, out):
    """An array is never converted silently: an output that was would stay empty."""
    s = plain_site()
    with pytest.raises(WRONG):
        ops.linear(x, [s], [out])


@pytest.mark.parametrize(
    ("gain", "eps"),
    [(zeros(39), 1e-5), (zeros(40, dtype=np.float64), 1e-5), (zeros(1, 40), 1e-5), (zeros(80)[::2], 1e-5),
     (zeros(40), -1.0), (zeros(40), np.nan), (zeros(40), np.inf), ([1.0] * 40, 1e-5)],
)  # fmt: skip
def test_wrong_norms(gain, eps):
    with pytest.raises(WRONG):
        ops.linear(zeros(2, 40), [plain_site()], [zeros(2, 20)], None, gain, eps)


def test_wrong_lists():
    s, other, wide = plain_site(), plain_site(rows=21), plain_site(cols=48)
    x, out = zeros(2, 40), zeros(2, 20)
    lists = [([s], []), ([], [out]), ([], []), ([s, s], [out]), ([None], [out]), ([1], [out]), (s, out), (None, None),
             ([s, wide], [out, out.copy()])]  # fmt: skip
    for sites, outs in lists:
        with pytest.raises(WRONG):
            ops.linear(x, sites, outs)
    for sites, outs in [([s], [out]), ([s, other], [out]), ([s, s], [out, out]), ([s, s, s], [out])]:
        with pytest.raises(WRONG):
            ops.linear(x, sites, outs, epilogue="silu")
    for epilogue in ("", "relu", "Add", None):
        with pytest.raises(WRONG):
            ops.linear(x, [s], [out], epilogue=epilogue)
    for extras in ([[], []], [None], [out]):
        with pytest.raises(WRONG):
            ops.linear(x, [s], [out], extras)


def test_a_gate_takes_whole_sites():
    split = ops.Site(20, 40, None)
    for rows in (range(5), range(5, 20)):
        split.block(uints(*rows))
        split.part(make(packed("bf16", len(rows))), BF16, -1, 0, [])
    x, out = zeros(2, 40), zeros(2, 20)
    ops.linear(x, [split], [out])
    for pair in ([split, plain_site()], [plain_site(), split]):
        with pytest.raises(ValueError, match="one block"):
            ops.linear(x, pair, [out], epilogue="silu")


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
        (np.array([0, 1, 2])[::2], zeros(2, 40)),
        (np.array([0]), zeros(1, 40, dtype=np.float64)),
        (np.array([0]), zeros(1, 80)[:, ::2]),
        (np.array([0]), frozen(zeros(1, 40))),
        ([0], zeros(1, 40)),
    ],
)
def test_wrong_arguments_of_look_ups(ids, out):
    weight = make(packed())
    with pytest.raises(WRONG):
        ops.decode_rows(weight, ids, out)
    if isinstance(ids, np.ndarray) and ids.flags.c_contiguous and ids.max() < 2**31:
        ids = ids.astype(np.int32)  # what an embedding takes
    with pytest.raises(WRONG):
        ops.embed(weight, ids, out)


def test_types_of_ids():
    weight, out = make(packed()), zeros(2, 40)
    ops.decode_rows(weight, np.array([3, 19]), out)
    ops.embed(weight, np.array([3, 19], np.int32), out)
    for kind in (np.int8, np.int16, np.uint32, np.uint64, np.float32, np.bool_):
        for call in (ops.decode_rows, ops.embed):
            with pytest.raises(WRONG):
                call(weight, np.array([0, 1], kind), out)
    with pytest.raises(WRONG):
        ops.decode_rows(weight, np.array([0, 1], np.int32), out)
    with pytest.raises(WRONG):
        ops.embed(weight, np.array([0, 1]), out)


def test_nothing_is_written_when_an_id_is_wrong():
    weight, out = make(packed()), np.full((3, 40), 7, np.float32)
    with pytest.raises(ValueError, match="20 rows"):
        ops.embed(weight, np.array([0, 1, 20], np.int32), out)
    with pytest.raises(ValueError, match="20 rows"):
        ops.decode_rows(weight, np.array([0, 1, 20]), out)
    assert (out == 7).all()


# ------------------------------------------------------------ weights


def arrays_of(text="uint4/g32"):
    """The arguments of a sound weight of 20 x 40."""
    raw = {n: a.view(np.uint8) for n, a in packed(text).arrays.items()}
    return {**raw, "group": 32, "scale": "f16", "zero_bits": 4}


def weight(changes, number="u4", rows=20, cols=40):
    given = {n: v for n, v in (arrays_of() | changes).items() if v is not ...}
    return ops.Weight(number, rows, cols, given)


@pytest.mark.parametrize(
    "changes",
    [
        {"q4": ...},
        {"q4": None},
        {"q4": np.zeros(16, np.uint8)},
        {"q4": np.zeros((2, 4096), np.uint8)},
        {"q4": np.zeros(1 << 14, np.uint8)[::2]},
        {"q4": np.zeros(1 << 14, np.int8)},
        {"q4": np.zeros(1 << 14, np.float32)},
        {"q4": [0] * 4096},
        {"q4": bytes(10)},
        {"scales": ...},
        {"scales": np.zeros(64, np.float16)},
        {"scales": np.zeros(2, np.uint8)},
        {"scale": "f32"},
        {"scale": "f64"},
        {"scale": "nested"},
        {"scale": "nested", "scales_nested": 3},
        {"scale": 16},
        {"zeros": ...},
        {"zeros": np.zeros(4, np.uint8)},
        {"zero_bits": 8, "zeros": np.zeros(63, np.uint8)},
        {"zero_bits": 5},
        {"zero_bits": -4},
        {"min": "f16"},
        {"min": "f16", "mins": np.zeros(128, np.uint8)},  # beside zero points
        {"step": 2.0},  # likewise
        {"zero": 8.0},
        {"table": np.zeros(16, np.float32)},
        {"group": ...},
        {"group": 0},
        {"group": -32},
        {"group": 12},
        {"group": 16},  # needs more scales
        {"group": (1 << 63) - 8},
        {"group": 1 << 70},
        {"group": "32"},
        {"group": 32.0},
        {"tile_rows": 0},
        {"tile_rows": -16},
        {"tile_rows": 8},
        {"tile_rows": 1 << 62},
    ],
    ids=str,
)
def test_wrong_weights(changes):
    weight({})
    with pytest.raises(WRONG):
        weight(changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"step": 0.0},
        {"step": -1.0},
        {"step": np.nan},
        {"step": 1e300},
        {"step": "1"},
        {"zero": np.inf},
        {"zero": 1e9},
        {"zero": -1.0},
        {"table": np.zeros(15, np.float32)},
        {"table": np.zeros(16)},
        {"table": moved(np.zeros(16, np.float32), 1)},
        {"table": np.zeros((4, 4), np.float32)},
        {"table_per_row": 1},
        {"table": np.zeros(16, np.float32), "table_per_row": 1},
    ],
    ids=str,
)
def test_wrong_meanings_of_codes(changes):
    plain = {"zeros": ..., "zero_bits": ...}
    weight(plain)
    weight({**plain, "table": np.zeros(16, np.float32)})
    with pytest.raises(WRONG):
        weight({**plain, **changes})


def test_wrong_numbers():
    for number in ("u0", "u9", "u3", "int4", "", "f64", None, 4):
        with pytest.raises(WRONG):
            weight({}, number)
    with pytest.raises(WRONG):
        ops.Weight("u4", 20, 40, None)


def test_nested_matrices_have_the_shape_of_the_scales():
    fmt = parse_weight("int4/g16*(int8/row)")
    kernel = packed("int4/g16*(int8/row)").format.kernel(packed("int4/g16*(int8/row)").arrays, 20, 40)
    raw = {"q4": kernel.q4.view(np.uint8), "group": 16, "zero": 8.0, "scale": "nested"}
    inner = kernel.scales.nested
    assert str(fmt.scale) == "int8/row"
    ops.Weight("u4", 20, 40, {**raw, "scales_nested": ops.make_weight(inner, 20, 3)})
    for rows, cols in ((19, 3), (20, 2), (3, 20)):
        with pytest.raises(ValueError, match="must be 20 x 3"):
            ops.Weight("u4", 20, 40, {**raw, "scales_nested": ops.make_weight(inner, rows, cols)})


SHAPES = [(0, 40), (20, 0), (-1, 40), (20, -8), (36, 40), (20, 4000), (20, 65)]
OVERFLOWING = [(1 << 40, 1 << 27), (1 << 40, 1 << 31), (1 << 62, 1), (1, 1 << 62), (1 << 63, 1), (1 << 46, 1)]


@pytest.mark.parametrize(("rows", "cols"), SHAPES + OVERFLOWING)
def test_shapes_that_the_arrays_do_not_fill_are_refused(rows, cols):
    """The byte counts of the largest do not fit 64 bits."""
    with pytest.raises(WRONG):
        weight({}, rows=rows, cols=cols)
    for number, size in (("f32", 4), ("f16", 2), ("bf16", 2)):
        with pytest.raises(WRONG):
            ops.Weight(number, rows, cols, {"values": np.zeros(size * 32 * 48, np.uint8)})


# ------------------------------------------------------------ inputs, masks and sites


@pytest.mark.parametrize(
    "arguments",
    [("int9", 0, 0.0, 0.0), ("", 0, 0.0, 0.0), ("int8", -16, 0.0, 0.0), ("int8", 8, 0.0, 0.0),
     ("int8", 1 << 40, 0.0, 0.0), ("int8", 0, -1.0, 0.0), ("int8", 0, np.nan, 0.0), ("int8", 0, np.inf, 0.0),
     ("int8", 0, 1e300, 0.0),
     ("int8", 0, 0.0, -1.0), ("int8", 0, 0.0, np.nan), ("int8", 0, 0.0, np.inf), ("bf16", 16, 0.0, 0.0),
     ("f32", 0, 1.0, 0.0), ("f32", 0, 0.0, 1.0), (None, 0, 0.0, 0.0)],
)  # fmt: skip
def test_wrong_inputs(arguments):
    with pytest.raises(WRONG):
        ops.Input(*arguments)


def mask(rows=20, cols=40, starts=(0, 2, 3), index=None, kind="f16", values=None, scale=1.0):
    index, values = (np.zeros(3 * 32, np.uint8) if a is None else a for a in (index, values))
    return ops.Mask(rows, cols, uints(*starts), index, kind, values, scale)


@pytest.mark.parametrize(
    "changes",
    [
        {"starts": (0, 2)},
        {"starts": (0, 3, 2)},
        {"starts": (3, 1, 2)},
        {"starts": (0, 2, 4)},
        {"starts": (0, 2, 0xFFFFFFFF)},
        {"index": np.zeros(95, np.uint8)},
        {"index": np.zeros(48, np.uint16)},
        {"index": np.full(96, 40, np.uint8)},  # column 0x2828
        {"cols": 1 << 17},  # 32-bit columns
        {"kind": "f32"},
        {"kind": "e4m3"},
        {"kind": "none"},
        {"kind": "nested"},
        {"kind": ""},
        {"values": np.zeros(95, np.uint8)},
        {"rows": 33},
        {"rows": 0},
        {"rows": 1 << 50},
        {"cols": -1},
        {"scale": None},
    ],
    ids=str,
)
def test_wrong_masks(changes):
    mask()
    mask(kind="int8", values=np.zeros(48, np.uint8))
    mask(index=np.full(96, 255, np.uint8))  # empty lanes
    with pytest.raises(WRONG):
        mask(**changes)


@pytest.mark.parametrize(
    "bias",
    [zeros(19), zeros(21), zeros(1, 20), zeros(20, dtype=np.float64), zeros(40)[::2], moved(zeros(20), 1), [0.0] * 20],
)
def test_wrong_biases(bias):
    with pytest.raises(WRONG):
        ops.Site(20, 40, bias)


def test_wrong_blocks():
    for index in (uints(), uints(20), uints(3, 3), uints(0xFFFFFFFF), np.array([1]), uints(1, 2, 3, 4)[::2], [1], "1",
                  moved(uints(1, 2), 1)):  # fmt: skip
        with pytest.raises(WRONG):
            ops.Site(20, 40, None).block(index)
    s = ops.Site(20, 40, None)
    s.block(uints(1, 2))
    for index in (uints(2), uints(3, 1), None):
        with pytest.raises(ValueError):
            s.block(index)
    s.block(uints(3))
    whole = ops.Site(20, 40, None)
    whole.block(None)
    for index in (None, uints(1)):
        with pytest.raises(ValueError):
            whole.block(index)
    for rows, cols in ((0, 40), (20, 0), (-1, 1), (1 << 62, 2)):
        with pytest.raises(ValueError):
            ops.Site(rows, cols, None)


def test_sites_that_leave_rows_out():
    x, out = zeros(2, 40), np.full((2, 20), 7, np.float32)
    s = ops.Site(20, 40, None)
    with pytest.raises(ValueError, match="blocks of a site of 20 rows hold 0"):
        ops.linear(x, [s], [out])
    s.block(uints(*range(19)))
    s.part(make(packed(rows=19)), BF16, -1, 0, [])
    with pytest.raises(ValueError, match="blocks of a site of 20 rows hold 19"):
        ops.linear(x, [s], [out])
    s.block(uints(19))
    with pytest.raises(ValueError, match="no parts"):
        ops.linear(x, [s], [out])
    assert (out == 7).all()


@pytest.mark.parametrize(
    "steps",
    [
        [("gather", uints(0, 1))],  # 2 columns for a matrix of 40
        [("gather", uints(*range(39), 40))],
        [("gather", uints(*range(40))), ("gather", uints(0))],
        [("gather", np.arange(40))],
        [("gather", list(range(40)))],
        [("gather", moved(np.arange(40, dtype=np.uint32), 2))],
        [("gather",)],
        [("multiply", zeros(39))],
        [("multiply", None)],
        [("multiply", zeros(40, dtype=np.float64))],
        [("hadamard", 40)],
        [("hadamard", 0, None)],
        [("hadamard", -8, None)],
        [("hadamard", 16, None)],  # does not divide 40
        [("hadamard", 3, None)],
        [("hadamard", 8, zeros(39))],
        [("hadamard", "8", None)],
        [("rotate", zeros(40))],
        [()],
        ["gather"],
        [None],
        None,
    ],
    ids=str,
)
def test_wrong_steps(steps):
    s = ops.Site(20, 40, None)
    s.block(None)
    with pytest.raises(WRONG):
        s.part(make(packed()), BF16, -1, 0, steps)
    s.part(make(packed()), BF16, -1, 0, [("hadamard", 8, None)])  # nothing of the refused part is left
    out = zeros(1, 20)
    ops.linear(np.ones((1, 40), np.float32), [s], [out])
    assert np.isfinite(out).all()


def test_wrong_parts():
    s = ops.Site(20, 40, None)
    good = make(packed())
    with pytest.raises(ValueError, match="needs a block"):
        s.part(good, BF16, -1, 0, [])
    s.block(None)
    for matrix in (make(packed(rows=19)), make(packed(cols=48)), mask(cols=41), mask(rows=17), None, 3, zeros(20, 40)):
        with pytest.raises(WRONG):
            s.part(matrix, BF16, -1, 0, [])
    for extra, cols in ((0, 0), (0, 39), (0, -40), (0, 1 << 40)):
        with pytest.raises(ValueError):
            s.part(good, BF16, extra, cols, [])
    s.part(good, BF16, 1, 40, [])
    x, out = zeros(2, 40), zeros(2, 20)
    for extras in ([], [[x]], *([[x, a]] for a in (zeros(2, 41), zeros(3, 40), zeros(40), x.astype(np.float64), None))):
        with pytest.raises(WRONG):
            ops.linear(x, [s], [out], extras)
    ops.linear(x, [s], [out], [[x, x]])


def test_gathers_that_widen_and_narrow():
    """A step may have more columns than the input and the matrix: its memory is as wide as the widest."""
    x = normal(3, 40)
    wide = np.random.default_rng(1).integers(0, 40, 5000).astype(np.uint32)
    narrow = np.random.default_rng(2).integers(0, 5000, 40).astype(np.uint32)
    s = ops.Site(20, 40, None)
    s.block(None)
    s.part(make(packed("f32")), ops.Input("f32", 0, 0.0, 0.0), -1, 0, [("gather", wide), ("gather", narrow)])
    direct = np.ascontiguousarray(x[:, wide][:, narrow])
    assert run(s, x).tobytes() == run(site(make(packed("f32")), parse_input("f32")), direct).tobytes()


def test_arrays_live_as_long_as_the_site():
    ours, x = packed("int4/g16*(int8/row)"), normal(2, 40)
    backwards = np.arange(40, dtype=np.uint32)[::-1].copy()
    steps = [("gather", backwards), ("multiply", normal(40)), ("hadamard", 8, np.ones(40, np.float32))]
    given = input_of(parse_input("int8/token"))

    def build(copy):
        s = ops.Site(20, 40, normal(20))
        s.block(copy(np.arange(20, dtype=np.uint32)))
        arrays = {n: copy(a) for n, a in ours.arrays.items()}
        matrix = make(Packed(ours.format, ours.shape, arrays))
        s.part(matrix, given, -1, 0, [tuple(copy(p) for p in step) for step in steps])
        return s

    kept = build(lambda a: a)
    wanted = run(kept, x)
    s = build(lambda a: a.copy() if isinstance(a, np.ndarray) else a)
    gc.collect()
    churn = [np.full(5000, 255, np.uint8) for _ in range(50)]
    assert run(s, x).tobytes() == wanted.tobytes()
    del churn


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
