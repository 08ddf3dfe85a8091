"""Maps and the checkpoint that applies them: what is read is W with every map, whatever rows are asked for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_gguf
from test_write import check_size, write

from gossamer import LLM
from gossamer.compress.edits import Edited
from gossamer.compress.job import compress
from gossamer.compress.maps import Blocks, Diagonal, HadamardMap, Map, Order, inverse_order
from gossamer.compress.recipe import of_format
from gossamer.compress.transforms import CorrectBias, RotateStream, apply_all, mean_error, rescale
from gossamer.errors import CheckpointError, UsageError
from gossamer.formats import encode, parse
from gossamer.formats.transforms import hadamard_matrix, signs
from gossamer.models.checkpoint import Checkpoint, open_checkpoint

UP, DOWN, Q, TABLE = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj", "q_proj", "model.embed_tokens"
RANDOM = np.random.default_rng(3)


def rotation(n: int) -> np.ndarray:
    return np.linalg.qr(RANDOM.standard_normal((n, n)))[0]


MAPS: dict[str, tuple[Map, np.ndarray]] = {}
for _name, _map, _dense in (
    ("diagonal", Diagonal(d := RANDOM.uniform(0.5, 2, 96)), np.diag(d)),
    ("order", Order(o := RANDOM.permutation(96)), np.eye(96)[o]),
    (
        "order in runs",
        Order(r := np.tile(np.arange(8)[::-1], 12) + np.repeat(np.arange(0, 96, 8), 8), 8),
        np.eye(96)[r],
    ),
    ("one matrix", Blocks(96, m := rotation(12)), np.kron(np.eye(8), m)),
    ("a matrix", Blocks(96, m2 := rotation(96)), m2),
    ("hadamard", HadamardMap(96, 32, 7), np.kron(np.eye(3), hadamard_matrix(32)) * signs(7, 96)),
    ("full hadamard", HadamardMap(96, 96), hadamard_matrix(96)),
):
    MAPS[_name] = (_map, _dense)


@pytest.mark.parametrize("name", MAPS)
def test_a_map_is_its_matrix(name: str) -> None:
    m, dense = MAPS[name]
    w, x = RANDOM.standard_normal((96, 40)), RANDOM.standard_normal((50, 96))
    assert np.allclose(m.rows(w, 0), dense @ w, atol=1e-5)
    for first in range(0, 96, m.block):
        assert np.allclose(m.rows(w[first : first + m.block], first), (dense @ w)[first : first + m.block], atol=1e-5)
    assert np.allclose(m.columns(x), x @ np.linalg.inv(dense), atol=1e-5)
    assert np.allclose(m.tokens(x), x @ dense.T, atol=1e-5)
    assert np.allclose(m.vector(x[0]), dense @ x[0], atol=1e-5)
    assert np.allclose(m.dual.rows(w, 0), np.linalg.inv(dense).T @ w, atol=1e-5)
    assert m.orthogonal == (name != "diagonal")


def test_blocks_may_differ() -> None:
    matrices = np.stack([rotation(4) for _ in range(3)])
    dense = np.zeros((12, 12))
    for i, b in enumerate(matrices):
        dense[4 * i : 4 * i + 4, 4 * i : 4 * i + 4] = b
    w, m = RANDOM.standard_normal((12, 5)), Blocks(12, matrices)
    assert np.allclose(m.rows(w, 0), dense @ w)
    assert np.allclose(m.rows(w[4:12], 4), (dense @ w)[4:12])
    assert np.allclose(m.columns(w.T), w.T @ dense.T)


def test_orders_undo() -> None:
    o = RANDOM.permutation(20)
    assert np.array_equal(o[inverse_order(o)], np.arange(20))


def test_maps_that_are_none() -> None:
    for wrong in ([1.0, 0.0], [1.0, np.nan], [1.0, np.inf]):
        with pytest.raises(UsageError, match="finite and not zero"):
            Diagonal(np.array(wrong))
    with pytest.raises(UsageError, match="must be orthogonal"):
        Blocks(4, np.ones((2, 2)))
    with pytest.raises(UsageError, match="do not lie along"):
        Blocks(5, np.eye(2))
    with pytest.raises(UsageError, match="take 1 or 3 blocks"):
        Blocks(6, np.stack([np.eye(2)] * 2))
    with pytest.raises(UsageError, match="each of them once"):
        Order(np.array([0, 0]))


# ---------------------------------------------------------------- the checkpoint


@pytest.fixture
def base(tiny: Path) -> Checkpoint:
    return open_checkpoint(tiny)


def whole(checkpoint: Checkpoint, name: str) -> np.ndarray:
    source = checkpoint.source(checkpoint.topology.site(name))
    return source.read(0, source.shape[0])


def test_maps_compose_on_both_sides(base: Checkpoint) -> None:
    """Several maps on each side, read in runs that do not fall on their blocks."""
    name = "model.layers.0.self_attn.o_proj"  # 96 x 96
    wanted = whole(base, name).astype(np.float64)
    left, right = ["hadamard", "diagonal", "order in runs", "one matrix"], ["order", "diagonal", "a matrix"]
    edited = Edited(base)
    for kind in left:
        edited.map_output(name, MAPS[kind][0])
        wanted = MAPS[kind][1] @ wanted
    for kind in right:
        edited.map_input(name, MAPS[kind][0])
        wanted = wanted @ np.linalg.inv(MAPS[kind][1])
    source = edited.source(edited.topology.site(name))
    for r0, r1 in ((0, 96), (0, 1), (5, 40), (33, 96), (95, 96), (40, 40)):
        assert np.allclose(source.read(r0, r1), wanted[r0:r1], atol=1e-5), (r0, r1)
    # Once more, in an Edited above, with a map that needs the whole matrix.
    above = Edited(edited)
    above.map_output(name, MAPS["a matrix"][0])
    assert np.allclose(whole(above, name), MAPS["a matrix"][1] @ wanted, atol=1e-5)


def test_rows_far_apart_are_read_through_the_whole_matrix(base: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    from gossamer.compress import edits

    edited, order = Edited(base), RANDOM.permutation(160)
    edited.map_output(UP, Order(order))
    edited.map_output(UP, Diagonal(np.linspace(1, 2, 160)))
    direct = whole(edited, UP)
    monkeypatch.setattr(edits, "ROWS_PER_STEP", 32)
    assert np.array_equal(whole(edited, UP), direct)
    assert np.allclose(direct, whole(base, UP)[order] * np.linspace(1, 2, 160)[:, None], atol=1e-6)


def test_an_edited_site_gives_no_stored_bytes(base: Checkpoint, tiny: Path, tmp_path: Path) -> None:
    """Neither of a GGUF file nor of a folder of ours, in the stored format or in another."""
    packed = write(tiny, tmp_path / "packed", "int8/g32", ()).path
    for checkpoint in (base, open_checkpoint(packed)):
        edited = Edited(checkpoint)
        edited.map_output(UP, Diagonal(np.full(160, 1.5)))
        site, other = edited.topology.site(UP), edited.topology.site(DOWN)
        assert str(edited.native(site)) == "f32 @ f32"
        assert np.array_equal(edited.pack(site).decode(), whole(edited, UP))
        stored = checkpoint.native(site)
        assert np.array_equal(edited.pack(site, stored).decode(), encode(stored.weight, edited.source(site)).decode())
        assert edited.native(other) == checkpoint.native(other)
        for name, array in checkpoint.pack(other).arrays.items():
            assert np.array_equal(edited.pack(other).arrays[name], array)


def test_norms_and_biases(tmp_path: Path) -> None:
    base = open_checkpoint(tiny_gguf.write(tmp_path / "q.gguf", q_bias=True))
    q = base.topology.site("model.layers.0.self_attn.q_proj")
    norm = next(v for v in base.topology.vectors if v.name == "model.layers.1.input_layernorm")
    edited = Edited(base)
    factors = np.linspace(0.5, 2, 96)
    edited.map_output(q.name, Diagonal(factors))
    edited.map_output(q.name, MAPS["order"][0])
    edited.map_gain(norm.name, Diagonal(factors))
    assert np.allclose(edited.bias(q), (base.bias(q) * factors)[MAPS["order"][0].index])
    assert np.allclose(edited.vector(norm), base.vector(norm) * factors)
    edited.set_gain(norm.name, np.ones(96))
    assert np.array_equal(edited.vector(norm), np.ones(96))


def test_a_tied_table_changes_on_both_sides_or_not_at_all(base: Checkpoint) -> None:
    edited, m = Edited(base), MAPS["one matrix"][0]
    for change in (edited.map_output, edited.map_input):
        with pytest.raises(UsageError, match="the table is the head too; untie it first"):
            change(TABLE, m)
    with pytest.raises(UsageError, match="only be rotated or reordered together"):
        edited.map_table(MAPS["diagonal"][0])
    edited.map_table(m)
    turned = whole(base, TABLE) @ MAPS["one matrix"][1].T
    assert np.allclose(whole(edited, TABLE), turned, atol=1e-5)
    edited.untie()
    edited.untie()
    assert not edited.topology.tied
    edited.map_input("lm_head", Diagonal(np.full(96, 0.5)))
    edited.map_output(TABLE, MAPS["diagonal"][0])
    assert np.allclose(whole(edited, "lm_head"), 2 * turned, atol=1e-5)
    assert np.allclose(whole(edited, TABLE), turned * np.diag(MAPS["diagonal"][1]), atol=1e-5)
    with pytest.raises(UsageError, match="has no input to change"):
        edited.map_input(TABLE, m)


def test_a_head_that_was_untied_alone(base: Checkpoint) -> None:
    edited = Edited(base)
    edited.untie()
    head = edited.topology.site("lm_head")
    assert edited.native(head) == base.native(base.topology.site(TABLE))
    assert np.array_equal(edited.pack(head).decode(), base.pack(base.topology.site(TABLE)).decode())
    assert np.array_equal(
        LLM(edited, format="f32 @ f32").logits([5, 6, 7]), LLM(base, format="f32 @ f32").logits([5, 6, 7])
    )


def test_edits_that_cannot_be(base: Checkpoint) -> None:
    edited = Edited(base)
    for wrong in (
        lambda: edited.map_output("model.layers.9.mlp.up_proj", MAPS["order"][0]),
        lambda: edited.map_output(UP, MAPS["order"][0]),
        lambda: edited.map_gain("model.layers.9.norm", MAPS["diagonal"][0]),
        lambda: edited.set_gain("model.norm", np.full(96, np.nan)),
        lambda: edited.set_bias(UP, np.ones(3)),
        lambda: edited.set_bias(TABLE, np.ones(96)),
    ):
        with pytest.raises(UsageError) as error:
            wrong()
        assert str(error.value).count("\n") == 0
    edited.map_output(UP, Diagonal(np.full(160, 1e39)))
    with pytest.raises(UsageError, match="NaN or an infinity"):
        whole(edited, UP)


# ---------------------------------------------------------------- written and read again


def test_an_edited_model_is_written_and_read_again(base: Checkpoint, tmp_path: Path) -> None:
    edited = Edited(base)
    apply_all(rescale(base.topology), edited)
    RotateStream(untie=True).apply(edited)
    done = compress(edited, tmp_path / "out", of_format("f32 @ f32"))
    check_size(done)
    tokens = list(range(40))
    after = LLM(done.path, kv="f32").logits(tokens)
    before = LLM(base, format="f32 @ f32", kv="f32").logits(tokens)
    assert np.abs(after - before).max() < 1e-3
    ledger = json.loads((done.path / "gossamer.json").read_text())
    assert ledger["source"]["edits"] == edited.log
    assert len(edited.log) == 2 * 4 + 1


@pytest.mark.parametrize("role", ["q", "o", "gate", "up", "down", "head"])
def test_any_site_can_be_given_a_bias(role: str, base: Checkpoint, tmp_path: Path) -> None:
    """It runs, it is stored, and the folder can be compressed again."""
    edited = Edited(base)
    edited.untie()
    site = next(s for s in edited.topology.sites if s.role == role)
    shift = RANDOM.standard_normal(site.rows)
    tokens = list(range(30))
    plain = LLM(edited, format="int8/g32").logits(tokens).copy()
    CorrectBias(site.name, shift).apply(edited)
    CorrectBias(site.name, shift).apply(edited)
    assert np.allclose(edited.bias(edited.topology.site(site.name)), 2 * shift)
    moved = LLM(edited, format="int8/g32").logits(tokens).copy()
    assert np.abs(moved - plain).max() > 0.1
    if role == "head":
        assert np.allclose(moved, plain + 2 * shift, atol=1e-4)
    first = write(edited, tmp_path / "first", "int8/g32", ())
    check_size(first)
    again = write(open_checkpoint(first.path), tmp_path / "again", "int8/g32", ())
    for done in (first, again):
        opened = open_checkpoint(done.path)
        assert opened.config.own_biases == {site.name}
        assert [s.name for s in opened.topology.sites if s.bias] == [site.name]
        assert np.array_equal(LLM(done.path).logits(tokens), moved)


def test_biases_in_a_ledger_that_cannot_be(base: Checkpoint, tmp_path: Path) -> None:
    edited = Edited(base)
    edited.set_bias(UP, np.ones(160))
    out = write(edited, tmp_path / "out", "int8/g32", ()).path
    ledger = json.loads((out / "gossamer.json").read_text())
    for wrong in ("up", [1], ["model.layers.7.mlp.up_proj"], [TABLE], [UP, DOWN], []):
        (out / "gossamer.json").write_text(json.dumps({**ledger, "biases": wrong}))
        with pytest.raises(CheckpointError) as error:
            open_checkpoint(out)
        assert str(error.value).count("\n") == 0


def test_the_mean_error_goes_into_the_bias(base: Checkpoint) -> None:
    """With the inputs' mean known, the mean of the outputs is what it was."""
    site = base.topology.site(DOWN)
    x = (RANDOM.standard_normal((400, site.cols)) + RANDOM.standard_normal(site.cols)).astype(np.float32)
    w, packed = whole(base, DOWN), encode(parse("int2/row").weight, base.source(site))
    shift = mean_error(base.source(site), packed, x.mean(axis=0))
    before = (x @ w.T - x @ packed.decode().T).mean(axis=0)
    after = before - shift
    assert np.abs(after).max() < 1e-3 * np.abs(before).max()
    # The inputs of the compressed model may have another mean.
    y = x + np.float32(0.3)
    shift = mean_error(base.source(site), packed, x.mean(axis=0), y.mean(axis=0))
    assert np.allclose((x @ w.T).mean(0), (y @ packed.decode().T).mean(0) + shift, atol=1e-4)
