"""What every format made of formats promises: near values, the bytes that were announced, rows that decode alone."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from gossamer.errors import FormatError
from gossamer.formats import (
    ArraySource,
    Composite,
    InputFormat,
    Packed,
    SiteFormat,
    bits_per_weight,
    encode,
    encode_with,
    layout,
    leaves,
    parse,
    parse_weight,
    project,
    resolve,
    scales,
    weight_of,
)
from gossamer.formats.node import ALIGN, PANEL
from gossamer.formats.transforms import hadamard_factors, hadamard_matrix, signs

F = np.float32

# Each node, alone and inside others; and the relative error (of the root of squares) that normal weights may have.
ERRORS = {
    "planes(int4/g32)": 0.12,
    "planes(uint5/row-m(f16))": 0.12,
    "planes(uint4/g32*(int8/g16))": 0.12,
    "planes(bipolar3/g16)": 0.3,
    "planes(int8/tensor)": 0.05,
    "planes(int6/16x32)": 0.1,
    "int4/g32 + mask(1%: f16)": 0.12,
    "int4/g32 + int4/g32": 0.02,
    "mask(5%: f32)": 0.92,
    "mask(5%: bf16)": 0.92,
    "mask(0.3%: int8/tensor)": 1.0,
    "int3/g16*(int6/g16) + mask(2.5%: int8/tensor)": 0.25,
    "rank1(bf16)": 1.0,
    "int4/g128 + rank1(f32)": 0.2,
    "cols(1: bf16, int4/row)": 0.4,
    "cols(2: f32, 3: int8/row, int4/g32) @ uint4/token": 0.25,
    "rows(1: bf16, int4/row)": 0.4,
    "rows(1: f32, 1: int8/g32, int4/g32)": 0.2,
    "hadamard(2, none, f32)": 1e-6,
    "hadamard(4, 7, int8/g16)": 0.01,
    "hadamard(12, 3, f32)": 1e-6,
    "permute(int4/g16)": 0.12,
    "permute(f16)": 1e-3,
    "scale(f32)": 1e-6,
    "scale(int4/g32)": 0.2,
    "scale(permute(cols(1: f16 @ f32, int8/row)))": 0.02,
    "permute(hadamard(4, 0, int4/g32 + rank1(bf16)))": 0.15,
}
FORMATS = {text: parse(text).weight for text in ERRORS}
SHAPES = [(1, 1), (1, 12), (2, 12), (12, 1), (3, 4), (15, 24), (16, 36), (17, 60), (33, 132), (40, 48)]
NODES = sorted(ERRORS)

every_format = pytest.mark.parametrize("text", NODES)


def fits(fmt, shape):
    try:
        fmt.check(*shape)
    except FormatError:
        return False
    return True


def shapes(text):
    found = [s for s in SHAPES if fits(FORMATS[text], s)]
    assert len(found) >= 3, text
    return found


def weights(rows, cols, seed=0):
    """Normal weights, some columns and rows larger, some zero, a few outliers."""
    rng = np.random.default_rng([seed, rows, cols])
    w = (rng.standard_normal((rows, cols)) * 0.02).astype(F)
    if rows > 12 and cols > 12:
        w[:, 3] *= 3
        w[5] *= 2
        w[7] = 0
        w[:, 8] = 0
        w[rng.integers(rows, size=3), rng.integers(cols, size=3)] = 0.3
    return w


def same(a, b):
    return a.shape == b.shape and np.array_equal(a.view(np.uint32), b.view(np.uint32))


@every_format
def test_decode_of_encode_is_near(text):
    for rows, cols in shapes(text):
        w = (np.random.default_rng([rows, cols]).standard_normal((rows, cols)) * 0.02).astype(F)
        back = encode(FORMATS[text], ArraySource(w)).decode()
        assert back.dtype == np.float32
        assert back.shape == w.shape
        error = np.sqrt(((back - w).astype(np.float64) ** 2).sum() / (w.astype(np.float64) ** 2).sum())
        assert error <= ERRORS[text] * (1 if rows * cols > 100 else 1.5), (rows, cols, error)


@every_format
def test_bytes(text):
    fmt = FORMATS[text]
    for rows, cols in shapes(text):
        packed = encode(fmt, ArraySource(weights(rows, cols)))
        packed.validate("this matrix")
        fields = fmt.fields(rows, cols)
        assert list(packed.arrays) == list(fields)
        exact = True
        for name, array in packed.arrays.items():
            assert array.nbytes % ALIGN == 0 < array.nbytes
            assert array.flags.c_contiguous
            if fields[name].exact:
                assert array.nbytes == fields[name].nbytes
                assert not array[fields[name].used :].any()
            else:
                exact = False
        assert packed.bits_per_weight == 8 * sum(a.nbytes for a in packed.arrays.values()) / (rows * cols)
        if exact:
            assert bits_per_weight(fmt, rows, cols) == packed.bits_per_weight
        again = encode(fmt, ArraySource(weights(rows, cols)))
        assert all(a.tobytes() == again.arrays[name].tobytes() for name, a in packed.arrays.items())


@every_format
def test_rows_decode_alone(text):
    for rows, cols in shapes(text):
        packed = encode(FORMATS[text], ArraySource(weights(rows, cols)))
        whole = packed.decode()
        for r0, r1 in [(0, 1), (0, rows), (rows // 2, rows), (15, 17), (16, 32), (3, 3)]:
            if r0 <= r1 <= rows:
                assert same(packed.decode(r0, r1), whole[r0:r1])


@every_format
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_weight_that_is_no_number_is_refused_with_its_row(text, bad):
    w = weights(40, 48)
    w[37, 4] = bad
    for make in (lambda f: encode(f, ArraySource(w), "layers.0.q"), lambda f: encode_with(f, w, where="layers.0.q")):
        with pytest.raises(FormatError, match=r"layers\.0\.q holds a NaN or an infinity in row 37"):
            make(FORMATS[text])


@every_format
def test_a_zero_matrix_stays_zero(text):
    if "bipolar" not in text:
        assert not project(FORMATS[text], np.zeros((33, 132), F)).any()


PROMISED = [t for t in NODES if t.startswith("planes")] + ["mask(5%: f32)", "mask(5%: bf16)", "mask(0.3%: int8/tensor)",
            "permute(f16)"]  # fmt: skip


@pytest.mark.parametrize("text", PROMISED)
def test_project_is_idempotent_where_it_is_promised(text):
    fmt = parse_weight(text)
    for shape in [(17, 60), (33, 132), (40, 48)]:
        once = project(fmt, weights(*shape, seed=1))
        assert same(project(fmt, once), once), shape


@every_format
def test_the_walk_reaches_every_array(text):
    fmt = FORMATS[text]
    rows, cols = 33, 132
    fields = fmt.fields(rows, cols)
    inner = {
        prefix + name: f for prefix, leaf, r, c in leaves(fmt, rows, cols) for name, f in leaf.fields(r, c).items()
    }
    assert all(fields[name] == f for name, f in inner.items())
    own = set(fields) - set(inner)
    assert {name.rpartition(".")[2] for name in own} <= {"index", "factors"}
    assert fmt.kernel(encode(fmt, ArraySource(weights(rows, cols))).arrays, rows, cols) is None
    for name, branch in fmt.parts:
        assert name.isdigit()
        assert parse_weight(str(weight_of(branch))) == weight_of(branch)


def test_branches_take_the_input_around_them():
    site = parse("cols(256: bf16 @ bf16, int4/row) @ uint4/token")
    branches = [branch for _, branch in site.weight.parts]
    assert [str(resolve(b, site.input)[1]) for b in branches] == ["bf16", "uint4/token"]
    assert isinstance(branches[0], SiteFormat)
    assert site.weight.integer
    assert not parse_weight("rank4(bf16)").integer


@pytest.mark.parametrize(("text", "shape", "says"), [
    ("cols(4: bf16, int4/row)", (3, 4), "leave at least one"),
    ("cols(2: bf16, 2: f16, int4/row)", (3, 4), "takes 4 columns"),
    ("rows(3: bf16, int4/row)", (3, 4), "takes 3 rows"),
    ("rank4(bf16)", (3, 8), "write rank3"),
    ("rank4(bf16)", (8, 3), "write rank3"),
    ("hadamard(64, none, bf16)", (3, 96), "blocks of 64 do not divide them; write hadamard(32 or 48 or 96"),
    ("hadamard(full, none, bf16)", (3, 688), "no matrix of size 688 is known; write hadamard(4 or 8 or 16"),
    ("hadamard(full, none, bf16)", (3, 97), "no block divides it"),
    ("hadamard(full, none, bf16)", (3, 1), "no block divides it"),
    ("permute(cols(8: bf16, int4/row))", (3, 8), "leave at least one"),
    ("cols(8: permute(rank4(bf16)), int4/row)", (3, 32), "write rank3"),
])  # fmt: skip
def test_a_shape_that_does_not_fit_is_named(text, shape, says):
    for act in (lambda f: f.check(*shape), lambda f: encode(f, ArraySource(np.ones(shape, F)))):
        with pytest.raises(FormatError) as caught:
            act(parse_weight(text))
        assert says in str(caught.value)


# ---------------------------------------------------------------- planes


@pytest.mark.parametrize("number", ["int8", "int5", "int2", "uint8", "uint6", "uint3", "bipolar8", "bipolar3"])
@pytest.mark.parametrize("rest", ["/g32", "/row*f16", "/tensor", "/16x32*bf16", "/g16*(int8/g16)", "/16x16*(int4/row)"])
@pytest.mark.parametrize("offset", ["", "-z(0)", "-m(f16)", "-m(uint4/g16-z(0))"])
def test_planes_hold_the_codes_of_what_is_inside(number, rest, offset):
    if offset and not number.startswith("uint"):
        return
    inner = parse_weight(f"{number}{rest}{offset}")
    fmt = parse_weight(f"planes({inner})")
    w = weights(37, 70)
    plain, apart = encode(inner, ArraySource(w)), encode(fmt, ArraySource(w))
    assert same(plain.decode(), apart.decode())
    assert bits_per_weight(fmt, 37, 70) == apart.bits_per_weight
    codes = inner.unpack_parts(plain.arrays, 37, 70, 0, 3).codes
    for b in range(inner.number.bits):  # each plane is the q1 array of a 1-bit matrix
        plane = {"q1": apart.arrays[f"p{b}"]}
        bits = parse_weight("bipolar1/row").unpack_parts({**plane, "scales": np.zeros(48, F)}, 37, 70, 0, 3).codes
        assert np.array_equal(bits[:37], (codes[:37] >> b) & 1)


@pytest.mark.parametrize("inner", ["int8/g32", "int5/row", "uint8/g32", "uint6/g16*(int8/g16)", "uint4/g32-m(f16)",
                                   "uint5/g16*(uint6/g8-z(0))-m(uint6/g8-z(0))", "bipolar4/g32", "int6/tensor",
                                   "int8/32x16*(uint8/row)", "uint7/g16-z(0)"])  # fmt: skip
def test_the_highest_planes_are_a_weight(inner):
    fmt = parse_weight(f"planes({inner})")
    coded = fmt.inner
    rows, cols = 37, 70
    w = weights(rows, cols)
    packed = encode(fmt, ArraySource(w))
    plain = encode(coded, ArraySource(w))
    codes = coded.unpack_parts(plain.arrays, rows, cols, 0, 3).codes[:rows].astype(F)
    family, bits = coded.number.family, coded.number.bits
    errors = []
    for k in range(1 if family == "bipolar" else 2, bits + 1):
        low = bits - k
        kept = {n: a for n, a in packed.arrays.items() if not (n[1:].isdigit() and int(n[1:]) < low and n[0] == "p")}
        top, arrays = fmt.top(k, kept, rows, cols)  # lower planes need not be there
        Packed(top, (rows, cols), arrays).validate("the highest planes")
        assert str(top.number.name) == f"{family}{k}"
        back = top.decode_rows(arrays, rows, cols, 0, rows)
        errors.append(float(((back - w).astype(np.float64) ** 2).mean()))
        cut = np.floor(codes / 2**low)
        if family == "bipolar":
            value = 2 * cut - (2**k - 1)
        elif coded.minimum is not None:
            value = cut
        else:
            zero = 2.0 ** (bits - 1) if family == "int" else 0
            if coded.zero:
                found = coded.unpack_parts(plain.arrays, rows, cols, 0, 3).zeros[:rows]
                zero = np.repeat(found, coded.width(cols), axis=1)[:, :cols].astype(F)
            value = cut - np.floor(zero / 2**low)
        s, m = scale_and_minimum(coded, plain.arrays, rows, cols)
        wanted = s * F(2**low) * value.astype(F) - m
        assert same(back + F(0), wanted + F(0))
    assert same(fmt.top(bits, packed.arrays, rows, cols)[0].decode_rows(arrays, rows, cols, 0, rows), plain.decode())
    assert all(b < a for a, b in pairwise(errors))  # every plane helps
    for bad in (0, bits + 1):
        with pytest.raises(FormatError, match="planes to read"):
            fmt.top(bad, packed.arrays, rows, cols)


def scale_and_minimum(coded, arrays, rows, cols):
    """float32 scale and minimum (or 0) of every element."""
    tiles, groups = coded.matrix(rows, cols)
    tile = coded.tile_rows(rows)
    parts = coded.unpack_parts(arrays, rows, cols, 0, layout.panels(rows))

    def read(name, kind):
        if kind is None:
            return F(0)
        if isinstance(kind, str):
            found = scales.load(getattr(parts, name), kind)
        else:
            found = kind.decode_rows(layout.under(arrays, f"{name}."), tiles, groups, 0, tiles)
        return np.repeat(found[np.arange(rows) // tile], coded.width(cols), axis=1)[:, :cols]

    return read("scales", coded.scale), read("mins", coded.minimum)


# ---------------------------------------------------------------- sums


def test_each_part_encodes_what_the_parts_before_leave():
    w = weights(33, 64)
    parts = [parse_weight(t) for t in ("int3/g32", "rank2(bf16)", "mask(1%: f16)")]
    packed = encode(parse_weight(" + ".join(map(str, parts))), ArraySource(w))
    rest, total = w, None
    for i, part in enumerate(parts):
        alone = encode(part, ArraySource(rest))
        for name, array in alone.arrays.items():
            assert np.array_equal(packed.arrays[f"{i}.{name}"], array)
        total = alone.decode() if total is None else total + alone.decode()
        rest = rest - alone.decode()
    assert same(packed.decode(), total)
    # The largest corrections are gone, to float16 precision.
    assert np.abs(w - packed.decode()).max() < np.abs(rest + alone.decode()).max()


# ---------------------------------------------------------------- mask


@pytest.mark.parametrize(("percent", "rows", "cols", "count"), [
    ("1", 10, 10, 1), ("5", 1, 10, 1), ("5", 1, 9, 0), ("5", 1, 11, 1), ("0.5", 10, 10, 1), ("0.49", 10, 10, 0),
    ("1.5", 100, 1, 2), ("2.5", 20, 1, 1), ("0.0001", 1000, 500, 1), ("5", 33, 132, 218),
])  # fmt: skip
def test_a_mask_keeps_the_largest_entries(percent, rows, cols, count):
    fmt = parse_weight(f"mask({percent}%: f32)")
    assert fmt.count(rows, cols) == count
    w = weights(rows, cols)
    back = project(fmt, w)
    assert np.count_nonzero(back) == count
    assert np.array_equal(back[back != 0], w[back != 0])
    if count:
        assert np.abs(w[back == 0]).max() <= np.abs(w[back != 0]).min()


def test_of_equal_entries_the_first_are_kept():
    w = np.full((4, 50), -1, F)
    w[3, 49] = 2
    back = project(parse_weight("mask(2%: f32)"), w)
    assert np.flatnonzero(back).tolist() == [0, 1, 2, 199]
    assert np.array_equal(project(parse_weight("mask(5%: f32)"), np.zeros((4, 50), F)), np.zeros((4, 50), F))


def test_the_layout_of_a_mask():
    w = np.zeros((18, 100), F)
    w[0, 7] = 1
    w[2, [3, 50, 99]] = 2, -3, 4
    w[17, 0] = 5
    packed = encode(parse_weight("mask(0.5%: f16)"), ArraySource(w))
    a = packed.arrays
    assert a["starts"][:3].tolist() == [0, 3, 4]
    assert a["index"].dtype == np.uint16
    assert a["values"].dtype == np.float16
    index, values = a["index"][:64].reshape(4, 16), a["values"][:64].reshape(4, 16)
    assert index[0, :4].tolist() == [7, 65535, 3, 65535]
    assert index[1:3, 2].tolist() == [50, 99]
    assert values[:3, 2].tolist() == [2, -3, 4]
    assert (index[3, 1], values[3, 1]) == (0, 5)
    assert (index != 65535).sum() == 5
    assert not values[index == 65535].any()
    eight = encode(parse_weight("mask(0.5%: int8/tensor)"), ArraySource(w)).arrays
    assert eight["scales"][0] == F(-5 / 128)
    stored = eight["values"][:64].reshape(4, 16)
    assert stored[3, 1] == 0
    assert (stored[index == 65535] == 128).all()


def test_wide_matrices_number_their_columns_in_32_bits():
    for cols, kind, none in ((65535, np.uint16, 0xFFFF), (65536, np.uint32, 0xFFFFFFFF)):
        w = np.zeros((1, cols), F)
        w[0, [0, cols - 1]] = 1, 2
        packed = encode(parse_weight("mask(0.01%: f32)"), ArraySource(w))
        assert packed.arrays["index"].dtype == kind
        assert packed.arrays["index"][[0, 1, 16]].tolist() == [0, none, cols - 1]
        packed.validate("wide")
        assert same(packed.decode(), w)


def test_a_mask_is_estimated_from_above():
    for rows, cols in ((64, 576), (160, 1024)):
        for text in ("mask(0.1%: f16)", "mask(1%: f16)", "mask(5%: int8/tensor)"):
            fmt = parse_weight(text)
            w = np.random.default_rng(0).standard_normal((rows, cols)).astype(F)
            exact, estimate = encode(fmt, ArraySource(w)).bits_per_weight, bits_per_weight(fmt, rows, cols)
            assert exact <= estimate <= 2.5 * exact + 0.1


@pytest.mark.parametrize(("name", "change", "says"), [
    ("starts", lambda a: a.__setitem__(0, 1), "begin with 0"),
    ("starts", lambda a: a.__setitem__(1, 1000), "never fall"),
    ("starts", lambda a: a.__setitem__(2, 60000), "long"),
    ("index", lambda a: a.__setitem__(int(np.argmin(a)), 100), "columns below 100"),
    ("index", lambda a: a.__setitem__(slice(0, 16), 50), "ascending"),
    ("index", lambda a: a.__setitem__(slice(-16, None), 3), "past the last row"),
])  # fmt: skip
def test_a_damaged_mask_is_refused(name, change, says):
    fmt = parse_weight("mask(5%: f16)")
    w = weights(18, 100)
    w[:16] += 1  # all entries lie in the first panel but one
    w[17, 5] = 9
    arrays = {n: a.copy() for n, a in encode(fmt, ArraySource(w)).arrays.items()}
    slots = int(arrays["starts"][2])
    view = arrays[name][: slots * PANEL] if name == "index" else arrays[name]
    change(view)
    with pytest.raises(FormatError, match=f"layer 3: array '(starts|index|values)' of .*{says}"):
        Packed(fmt, (18, 100), arrays).validate("layer 3")


# ---------------------------------------------------------------- low rank


def test_low_rank_is_the_best_of_its_rank():
    rng = np.random.default_rng(0)
    w = (rng.standard_normal((70, 50)) @ np.diag(0.8 ** np.arange(50))).astype(F)
    values = np.linalg.svd(w.astype(np.float64), compute_uv=False)
    for rank in (1, 7, 50):
        packed = encode(parse_weight(f"rank{rank}(f32)"), ArraySource(w))
        error = np.linalg.norm(packed.decode().astype(np.float64) - w)
        assert error == pytest.approx(np.linalg.norm(values[rank:]), rel=1e-4, abs=1e-4)
        u = parse_weight("f32").decode_rows({"values": packed.arrays["0.values"]}, 70, rank, 0, 70)
        v = parse_weight("f32").decode_rows({"values": packed.arrays["1.values"]}, rank, 50, 0, rank)
        assert np.allclose(np.linalg.norm(u, axis=0), np.linalg.norm(v, axis=1), rtol=1e-4, atol=1e-5)
        assert (np.take_along_axis(u, np.abs(u).argmax(axis=0)[None], axis=0) > 0).all()


def test_a_large_matrix_is_decomposed_nearly_as_well():
    rng = np.random.default_rng(0)
    w = (rng.standard_normal((1100, 40)) @ rng.standard_normal((40, 1200)) / 40).astype(F)
    w += (rng.standard_normal(w.shape) * 0.01).astype(F)
    values = np.linalg.svd(w.astype(np.float64), compute_uv=False)
    fmt = parse_weight("rank24(f32)")
    packed = encode(fmt, ArraySource(w))
    error = np.linalg.norm(packed.decode().astype(np.float64) - w)
    assert error <= 1.001 * np.linalg.norm(values[24:])
    again = encode(fmt, ArraySource(w))
    assert all(np.array_equal(a, again.arrays[n]) for n, a in packed.arrays.items())


@pytest.mark.parametrize("size", [1e-38, 1e-20, 1e20, 1e37])
def test_low_rank_of_tiny_and_huge_weights(size):
    w = (np.outer(np.arange(1, 20), np.arange(1, 30)) / 600 * size).astype(F)
    assert np.allclose(project(parse_weight("rank1(f32)"), w) / F(size), w / F(size), rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- splits


def test_splits_take_the_largest_first():
    w = np.ones((20, 30), F)
    w[4, 9], w[7, 2], w[1, 29] = 5, -9, 7
    packed = encode(parse_weight("cols(1: f32, 2: f16, bf16)"), ArraySource(w))
    assert packed.arrays["index"][:3].tolist() == [2, 9, 29]
    assert packed.arrays["index"].dtype == np.uint32
    packed = encode(parse_weight("rows(2: f32, 2: f16, bf16)"), ArraySource(w))
    assert packed.arrays["index"][:4].tolist() == [1, 7, 0, 4]  # of equal ones the first


def test_parts_of_a_split_are_stored_in_their_formats():
    w = weights(20, 40)
    fmt = parse_weight("cols(3: f32, int4/g16)")
    packed = encode_with(fmt, w, {"columns": [30, 2, 11]})
    assert packed.arrays["index"][:3].tolist() == [2, 11, 30]
    back = packed.decode()
    assert same(back[:, [2, 11, 30]], w[:, [2, 11, 30]])
    rest = np.setdiff1d(np.arange(40), [2, 11, 30])
    assert same(back[:, rest], project(parse_weight("int4/g16"), w[:, rest]))
    fmt = parse_weight("rows(3: f32, int4/g16)")
    back = encode_with(fmt, w, {"rows": np.array([19, 2, 0])}).decode()
    assert same(back[[0, 2, 19]], w[[0, 2, 19]])
    rest = np.setdiff1d(np.arange(20), [0, 2, 19])
    assert same(back[rest], project(parse_weight("int4/g16"), w[rest]))


# ---------------------------------------------------------------- transforms


TRANSFORMS = ("hadamard(8, 5, {})", "hadamard(full, none, {})", "hadamard(12, 1, {})", "permute({})", "scale({})")


@pytest.mark.parametrize("text", TRANSFORMS)
def test_a_transformed_site_is_the_same_map(text):
    w, x = weights(20, 24), np.random.default_rng(1).standard_normal((5, 24)).astype(F)
    for inner in ("f32", "int8/g16"):
        fmt = parse_weight(text.format(inner))
        packed = encode(fmt, ArraySource(w))
        stored = fmt.parts[0][1].decode_rows(layout.under(packed.arrays, "0."), 20, 24, 0, 20)
        y = fmt.transform(x, packed.arrays).astype(np.float64) @ stored.T.astype(np.float64)
        assert fmt.transform(x, packed.arrays).dtype == np.float32
        assert np.allclose(y, x.astype(np.float64) @ packed.decode().T.astype(np.float64), atol=2e-6)


@pytest.mark.parametrize("n", [1, 2, 4, 8, 12, 16, 20, 24, 28, 36, 40, 44, 60, 64, 68, 76, 84, 104, 148, 576, 1536])
def test_hadamard_matrices(n):
    h = hadamard_matrix(n)
    assert np.allclose(h @ h.T, np.eye(n), atol=1e-12)
    assert np.allclose(np.abs(h) * np.sqrt(n), 1)
    k, power = hadamard_factors(n)
    assert k * power == n
    if n > 1:
        x = np.random.default_rng(n).standard_normal((3, n)).astype(F)
        fmt = parse_weight(f"hadamard({n}, 9, f32)")
        d = signs(9, n)
        assert np.allclose(fmt.transform(x, {}), (x * d) @ h.T, atol=1e-5)
        wide = np.concatenate([x, x[::-1]], axis=1)  # two blocks
        assert same(fmt.transform(wide, {})[:, :n], (fmt.transform(x * d * signs(9, 2 * n)[:n], {})))


def test_which_hadamard_matrices_there_are():
    with_one = {k for k in range(1, 257) if hadamard_factors(k)}
    assert {1, 2, 4, 8, 12, 20, 24, 28, 36, 40, 44, 48, 60, 164} <= with_one
    assert with_one.isdisjoint({3, 6, 10, 52, 92, 100, 116, 156, 172, 180, 252})  # need prime powers, or are too large
    assert all(n in (1, 2) or n % 4 == 0 for n in with_one)
    assert hadamard_factors(0) is None
    assert hadamard_factors(-4) is None
    for n, factors in {576: (36, 16), 1536: (12, 128), 14336: (28, 512), 8960: (140, 64), 11008: None}.items():
        assert hadamard_factors(n) == factors


def test_signs_are_those_of_splitmix64():
    def reference(seed, count):
        state, found = seed, []
        for _ in range(count):
            state = (state + 0x9E3779B97F4A7C15) % 2**64
            z = state
            z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
            z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
            found.append(-1.0 if (z ^ (z >> 31)) >> 63 else 1.0)
        return found

    for seed in (0, 1, 7, 2**32 - 1):
        assert signs(seed, 100).tolist() == reference(seed, 100)
    # The first outputs of state 0 are e220a839..., 6e789e6a..., 06c45d18..., f88bb8a8... (Vigna's reference program).
    assert signs(0, 4).tolist() == [-1, 1, 1, -1]
    assert (signs(None, 5) == 1).all()
    assert abs(signs(3, 10_000).mean()) < 0.05


def test_what_permute_and_scale_choose():
    w = np.array([[1, -4, 0, 4], [0.5, 1, 0, 2]], F)
    packed = encode(parse_weight("permute(f32)"), ArraySource(w))
    assert packed.arrays["index"][:4].tolist() == [1, 3, 0, 2]
    assert same(packed.decode(), w)
    packed = encode(parse_weight("scale(f32)"), ArraySource(w))
    assert packed.arrays["factors"][:4].tolist() == [1, 2, 1, 2]
    assert same(packed.decode(), w)


# ---------------------------------------------------------------- hints


def test_hints():
    w = weights(20, 24)
    order = np.random.default_rng(0).permutation(24)
    packed = encode_with(parse_weight("permute(int4/g16)"), w, {"order": order})
    assert packed.arrays["index"][:24].tolist() == order.tolist()
    assert same(packed.decode()[:, order], project(parse_weight("int4/g16"), w[:, order]))
    factors = np.linspace(0.5, 2, 24).astype(F)
    packed = encode_with(parse_weight("scale(f32)"), w, {"factors": factors})
    assert np.array_equal(packed.arrays["factors"][:24], factors)
    entries = np.zeros(w.shape, bool)
    entries[3, 5] = entries[19, 0] = True
    packed = encode_with(parse_weight("int4/g16 + mask(1%: f32)"), w, {"1": {"entries": entries}})
    assert np.allclose(packed.decode()[entries], w[entries])
    u, v = np.ones((20, 2), F), np.full((2, 24), 3, F)
    assert (encode_with(parse_weight("rank2(f32)"), w, {"factors": (u, v)}).decode() == 6).all()
    nested = parse_weight("permute(cols(2: f32, 1: f16, int4/g16))")
    packed = encode_with(nested, w, {"order": order, "0": {"columns": [[4, 0], [7]]}})
    assert packed.arrays["0.index"][:3].tolist() == [0, 4, 7]
    assert np.array_equal(encode_with(nested, w).decode(), encode(nested, ArraySource(w)).decode())


@pytest.mark.parametrize(("text", "hints", "says"), [
    ("int4/g16", {"columns": [1]}, "takes no hint 'columns'"),
    ("cols(2: f32, int4/g16)", {"rows": [1, 2]}, "takes no hint 'rows'; its hints: 'columns'"),
    ("cols(2: f32, int4/g16)", {"0": {"columns": [1]}}, "f32 takes no hint"),
    ("cols(2: f32, int4/g16)", {"2": {}}, "takes no hint '2'"),
    ("cols(2: f32, int4/g16)", {"columns": [1]}, "2 different numbers from 0 to 23"),
    ("cols(2: f32, int4/g16)", {"columns": [1, 1]}, "different"),
    ("cols(2: f32, int4/g16)", {"columns": [1, 24]}, "0 to 23"),
    ("cols(2: f32, int4/g16)", {"columns": [1, -1]}, "0 to 23"),
    ("cols(2: f32, int4/g16)", {"columns": [1.0, 2.0]}, "different numbers"),
    ("rows(2: f32, int4/g16)", {"rows": [1, 20]}, "0 to 19"),
    ("permute(f32)", {"order": range(23)}, "24 different"),
    ("scale(f32)", {"factors": np.zeros(24)}, "24 positive"),
    ("scale(f32)", {"factors": np.ones(23)}, "24 positive"),
    ("scale(f32)", {"factors": np.full(24, np.nan)}, "24 positive"),
    ("mask(1%: f16)", {"entries": np.ones((20, 24), bool)}, "at most 5"),
    ("mask(1%: f16)", {"entries": np.zeros((20, 24))}, "truth values"),
    ("rank2(f32)", {"factors": (np.ones((20, 3)), np.ones((3, 24)))}, "20 x 2 and 2 x 24"),
    ("rank2(f32)", {"factors": (np.full((20, 2), np.inf), np.ones((2, 24)))}, "NaN or an infinity"),
])  # fmt: skip
def test_hints_that_do_not_fit_are_refused(text, hints, says):
    with pytest.raises(FormatError) as caught:
        encode_with(parse_weight(text), weights(20, 24), hints)
    assert says in str(caught.value)


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize(("text", "name", "at", "value", "says"), [
    ("cols(3: f32, int4/g16)", "index", 0, 24, "different columns of 24"),
    ("cols(3: f32, int4/g16)", "index", 2, 0, "ascending"),
    ("cols(2: f32, 1: f16, int4/g16)", "index", slice(None), 5, "3 different"),
    ("rows(3: f32, int4/g16)", "index", 1, 20, "different rows of 20"),
    ("permute(f32)", "index", 3, 24, "each of 0 to 23 once"),
    ("permute(f32)", "index", slice(None), 5, "each of 0 to 23 once"),
    ("scale(f32)", "factors", 5, 0, "positive"),
    ("scale(f32)", "factors", 5, np.nan, "positive"),
    ("permute(scale(f32))", "0.factors", 5, -1, "positive"),
    ("int4/g16 + mask(5%: f16)", "1.starts", 0, 3, "begin with 0"),
])  # fmt: skip
def test_damaged_indices_are_refused(text, name, at, value, says):
    fmt = parse_weight(text)
    packed = encode(fmt, ArraySource(weights(20, 24)))
    arrays = {n: a.copy() for n, a in packed.arrays.items()}
    arrays[name][at] = value
    with pytest.raises(FormatError, match=rf"layer 3: array '{name.rpartition('.')[2]}' of .*{says}"):
        Packed(fmt, (20, 24), arrays).validate("layer 3")


@every_format
def test_validate_names_what_is_wrong(text):
    fmt = FORMATS[text]
    packed = encode(fmt, ArraySource(weights(17, 60)))
    for name, array in packed.arrays.items():
        for wrong in (array[:-1], array.astype("i8"), array.reshape(1, -1), array[:0]):
            with pytest.raises(FormatError, match="layer 3: array '"):
                Packed(fmt, (17, 60), {**packed.arrays, name: wrong}).validate("layer 3")
    with pytest.raises(FormatError, match="layer 3 is stored as"):
        Packed(fmt, (17, 60), {**packed.arrays, "extra": array}).validate("layer 3")
    with pytest.raises(FormatError, match="layer 3 is stored as"):
        Packed(fmt, (17, 60), {}).validate("layer 3")


def test_plain_formats_are_validated_too():
    packed = encode(parse_weight("int4/g32"), ArraySource(weights(17, 60)))
    packed.validate("layer 3")
    with pytest.raises(FormatError, match="layer 3: array 'q4'"):
        Packed(packed.format, (17, 61 + 60), packed.arrays).validate("layer 3")


def test_residuals_beyond_float32_are_refused():
    w = np.full((4, 16), np.finfo(F).max, F)
    with pytest.raises(FormatError, match="infinity"):
        encode(parse_weight("hadamard(16, none, f32)"), ArraySource(w))


def test_the_input_of_a_site_is_a_value():
    assert SiteFormat(parse_weight("permute(int4/g32)"), InputFormat("int8")) == parse("permute(int4/g32) @ int8/token")
    assert {parse("permute(int4/g32) @ int8/token"), parse("permute(int4/g32)@int8/token")} == {
        parse("permute(int4/g32) @ int8/token")
    }
    assert isinstance(parse_weight("permute(int4/g32)"), Composite)
