"""compressed-tensors folders open as expressions whose codes and scales are those that were packed."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import foreign
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gossamer.checkpoints.ct_scheme import read_config, scheme_of
from gossamer.checkpoints.words import pack_words, unpack_words
from gossamer.errors import CheckpointError, GossamerError, UnsupportedError
from gossamer.formats.numbers import NUMBERS
from gossamer.models.checkpoint import Checkpoint, open_checkpoint

TOKEN8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
FLOAT8 = {**TOKEN8, "type": "float"}


def weights(bits: int = 4, strategy: str = "group", **more: Any) -> dict[str, Any]:
    group = {"group_size": 32} if strategy == "group" else {}
    return {"num_bits": bits, "type": "int", "symmetric": True, "strategy": strategy, "dynamic": False, **group, **more}


def config(w: dict[str, Any], x: dict[str, Any] | None = None, form: str = "pack-quantized", **more: Any) -> Any:
    group = {"targets": ["Linear"], "weights": w, "input_activations": x, "output_activations": None, "format": form}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "config_groups": {"group_0": group},
        "global_compression_ratio": None,
        **more,
    }


class Layers:
    """Tensors of layers, and the weights that they stand for."""

    def __init__(self, w: dict[str, Any], form: str = "pack-quantized", scale: str = "F16", **options: Any) -> None:
        self.w, self.form, self.scale, self.options = w, form, scale, options
        self.made: list[np.ndarray] = []

    def layer(self, rows: int, cols: int, rng: Any) -> dict[str, Any]:
        bits, strategy = self.w["num_bits"], self.w["strategy"]
        tile = {"group": (1, self.w.get("group_size")), "channel": (1, cols), "tensor": (rows, cols)}
        height, width = tuple(self.w["block_structure"]) if strategy == "block" else tile[strategy]
        r, c = np.arange(rows) // height, np.arange(cols) // width
        found: dict[str, Any] = {}
        if self.options.get("order"):
            c = rng.permutation(c)
            found["weight_g_idx"] = ("I32", c)
        shape = (1,) if strategy == "tensor" else (r.max() + 1, np.unique(c).size)
        s = (rng.standard_normal(shape) / 50).astype(np.float16 if self.scale == "F16" else np.float32)
        if self.scale == "BF16":
            stored = (s.view(np.uint32) >> 16).astype(np.uint16)
            s = (stored.astype(np.uint32) << 16).view(np.float32)
        found["weight_scale"] = (self.scale, stored if self.scale == "BF16" else s)
        s32 = s.astype(np.float32)
        s32 = np.full((rows, cols), s32[0]) if strategy == "tensor" else s32[r][:, c]
        if self.w["type"] == "float":
            codes = rng.integers(0, 127, (rows, cols)) | rng.integers(0, 2, (rows, cols)) << 7
            found["weight"] = ("F8_E4M3", codes)
            self.made.append(NUMBERS["e4m3"].values[codes] * s32)
            return found
        middle = 1 << (bits - 1)
        q = rng.integers(-middle, middle, (rows, cols))
        z = np.zeros((rows, shape[-1]), np.int64)
        packed = self.form == "pack-quantized"
        if not self.w["symmetric"]:
            z = rng.integers(-middle, middle, z.shape)
            form = ("I32", foreign.lines((z + middle).T, bits).T) if packed else ("I8", z)
            found["weight_zero_point"] = ("I8", z) if self.options.get("old") else form
        if packed:
            found |= {"weight_packed": ("I32", foreign.lines(q + middle, bits)), "weight_shape": ("I64", [rows, cols])}
        else:
            found["weight"] = ("I8", q)
        self.made.append((q - z[:, c if len(shape) == 2 else 0 * c]).astype(np.float32) * s32)
        return found


def opened(folder: Path, layers: Layers, quantization: Any) -> Checkpoint:
    return open_checkpoint(foreign.write(folder / "m", foreign.model(layers.layer), quantization))


CASES = [
    (weights(4), None, "pack-quantized", "F16", "int4/g32"),
    (weights(4, symmetric=False), None, "pack-quantized", "BF16", "uint4/g32*bf16"),
    (weights(3), None, "pack-quantized", "F32", "int3/g32*f32"),
    (weights(5, symmetric=False), None, "pack-quantized", "F16", "uint5/g32"),
    (weights(8, "channel"), None, "pack-quantized", "F32", "int8/row"),
    (weights(4, "channel"), TOKEN8, "pack-quantized", "F32", "int4/row @ int8/token"),
    (weights(8, "channel"), TOKEN8, "int-quantized", "BF16", "int8/row*bf16 @ int8/token"),
    (weights(8, "channel", symmetric=False), TOKEN8, "int-quantized", "F32", "uint8/row @ int8/token"),
    (weights(8, "tensor"), TOKEN8, "naive-quantized", "F32", "int8/tensor @ int8/token"),
    (weights(8, "channel", type="float"), FLOAT8, "float-quantized", "F32", "e4m3/row @ e4m3/token"),
    (weights(8, "tensor", type="float"), FLOAT8, "float-quantized", "F16", "e4m3/tensor*f16 @ e4m3/token"),
    (
        weights(8, "block", type="float", block_structure=[32, 16]),
        {**FLOAT8, "strategy": "group", "group_size": 32},
        "float-quantized",
        "F32",
        "e4m3/32x16 @ e4m3/g32",
    ),
]


@pytest.mark.parametrize(("w", "x", "form", "scale", "expression"), CASES)
def test_codes_and_scales_are_moved_as_they_are(
    w: Any, x: Any, form: str, scale: str, expression: str, tmp_path: Path
) -> None:
    layers = Layers(w, form, scale)
    check(opened(tmp_path, layers, config(w, x, form)), layers, expression)


def check(checkpoint: Checkpoint, layers: Layers, expression: str) -> None:
    linear = [s for s in checkpoint.topology.sites if s.role not in ("embed", "head")]
    for site, w in zip(linear, layers.made, strict=True):
        assert str(checkpoint.native(site)) == expression
        packed = checkpoint.pack(site)
        packed.validate(site.name)
        assert np.array_equal(packed.decode(), w), site.name
    assert str(checkpoint.native(checkpoint.topology.site("lm_head"))) == "f32 @ f32"


def test_activation_order_and_zero_points_of_old_files(tmp_path: Path) -> None:
    w = weights(4, symmetric=False, actorder="group")
    layers = Layers(w, order=True, old=True)
    check(opened(tmp_path, layers, config(w)), layers, "permute(uint4/g32)")


def test_activation_order_that_leaves_columns_in_place(tmp_path: Path) -> None:
    w = weights(4, actorder="static")
    layers = Layers(w)
    check(opened(tmp_path, layers, config(w)), layers, "int4/g32")


def test_fixed_scales_of_inputs(tmp_path: Path) -> None:
    w, x = weights(8, "tensor", type="float"), {**FLOAT8, "strategy": "tensor", "dynamic": False}
    layers = Layers(w, "float-quantized", "F32")

    def layer(rows: int, cols: int, rng: Any) -> dict[str, Any]:
        return {**layers.layer(rows, cols, rng), "input_scale": ("F32", [0.03125])}

    folder = foreign.write(tmp_path / "m", foreign.model(layer), config(w, x, "float-quantized"))
    check(open_checkpoint(folder), layers, "e4m3/tensor @ e4m3/static(0.03125)")


def test_zero_points_that_symmetric_weights_carry_must_be_zero(tmp_path: Path) -> None:
    layers, name = Layers(weights(4)), "model.layers.0.mlp.up_proj.weight_zero_point"
    tensors = foreign.model(layers.layer)
    tensors[name] = ("I8", np.zeros((96, 2)))
    check(open_checkpoint(foreign.write(tmp_path / "m", tensors, config(weights(4)))), layers, "int4/g32")
    tensors[name] = ("I8", np.ones((96, 2)))
    with pytest.raises(CheckpointError, match="called symmetric"):
        open_checkpoint(foreign.write(tmp_path / "n", tensors, config(weights(4))))


def test_more_specific_targets_win() -> None:
    groups = {
        "a": {"targets": ["Linear"], "weights": weights(4)},
        "b": {"targets": ["re:.*down_proj$"], "weights": weights(8)},
        "c": {"targets": ["model.layers.1.mlp.down_proj"], "weights": weights(3)},
    }
    plan = read_config(
        {**config(weights()), "config_groups": groups, "ignore": ["lm_head", "re:.*k_proj"]}, "config.json"
    )

    def bits(name: str, kind: str = "Linear") -> int | None:
        found = scheme_of(name, kind, *plan)
        return None if found is None else found.weights.bits

    assert bits("model.layers.0.mlp.up_proj") == 4
    assert bits("model.layers.0.mlp.down_proj") == 8
    assert bits("model.layers.1.mlp.down_proj") == 3
    assert bits("model.layers.1.self_attn.k_proj") is None
    assert bits("lm_head") is None
    assert bits("model.embed_tokens", "Embedding") is None


REFUSED: dict[str, dict[str, Any]] = {
    "stored as 'nvfp4-pack-quantized'": config(weights(4), form="nvfp4-pack-quantized"),
    "stored as 'marlin-24'": config(weights(4), form="marlin-24"),
    "quantizes with 'kv_cache_scheme'": config(weights(4), kv_cache_scheme=FLOAT8),
    "quantizes with 'transform_config'": config(weights(4), transform_config={"config_groups": {"R1": {}}}),
    "quantizes with 'sparsity_config'": config(weights(4), sparsity_config={"format": "sparse-24-bitmask"}),
    "status is 'initialized'": config(weights(4), quantization_status="initialized"),
    "dynamic inputs of 8 bits of type 'int' for each 'tensor'": config(weights(4), {**TOKEN8, "strategy": "tensor"}),
    "static inputs of 8 bits of type 'int' with zero points": config(
        weights(4), {**TOKEN8, "strategy": "tensor", "dynamic": False, "symmetric": False}
    ),
    "weights of 4 bits of type 'float'": config(weights(4, type="float")),
    "the argument 'blocks'": config(weights(4, blocks=3)),
    "no list of arguments": config(weights(4), config_groups={"W4A16": ["Linear"]}),
    "a pattern of more kinds": config(weights(4), ignore=["re:(a+)+b"]),
}


@pytest.mark.parametrize(("words", "quantization"), REFUSED.items())
def test_other_schemes_are_refused_by_name(words: str, quantization: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError) as error:
        opened(tmp_path, Layers(weights(4)), quantization)
    assert words in str(error.value)


def test_a_site_without_its_tensors_is_named(tmp_path: Path) -> None:
    tensors = foreign.model(Layers(weights(4)).layer)
    del tensors["model.layers.0.mlp.up_proj.weight_scale"]
    with pytest.raises(CheckpointError, match=r"lacks the tensor 'model\.layers\.0\.mlp\.up_proj\.weight_scale'"):
        open_checkpoint(foreign.write(tmp_path / "m", tensors, config(weights(4))))


def test_a_nan_is_refused(tmp_path: Path) -> None:
    w = weights(8, "channel", type="float")
    tensors = foreign.model(Layers(w, "float-quantized").layer)
    tensors["model.layers.0.mlp.up_proj.weight"][1][3, 3] = 0x7F
    checkpoint = open_checkpoint(foreign.write(tmp_path / "m", tensors, config(w, None, "float-quantized")))
    with pytest.raises(CheckpointError, match="holds a NaN"):
        checkpoint.pack(checkpoint.topology.site("model.layers.0.mlp.up_proj"))


@given(st.integers(2, 8), st.integers(1, 5), st.integers(1, 70), st.randoms(use_true_random=False))
def test_words(bits: int, rows: int, count: int, random: Any) -> None:
    codes = np.array([[random.randrange(1 << bits) for _ in range(count)] for _ in range(rows)], np.uint8)
    assert np.array_equal(pack_words(codes, bits), foreign.lines(codes, bits))
    assert np.array_equal(unpack_words(foreign.lines(codes, bits), bits, count), codes)


SOUND = foreign.model(Layers(weights(4)).layer)  # made once: it is the slow part
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 70), 1 << 70),
    st.floats(),
    st.sampled_from(["re:[", "re:a{9}", "group"]),
    st.lists(st.integers(-2, 300), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    arguments=st.dictionaries(
        st.sampled_from([*weights(4), "block_structure", "actorder"]),
        scalars,
        max_size=2,
    ),
    inputs=st.one_of(scalars, st.just(TOKEN8), st.dictionaries(st.sampled_from(sorted(TOKEN8)), scalars, max_size=5)),
    top=st.dictionaries(
        st.sampled_from(["format", "ignore", "config_groups", "quantization_status", "quant_method", "other"]),
        st.one_of(scalars, st.dictionaries(st.text(max_size=2), scalars, max_size=2)),
        max_size=1,
    ),
    shapes=st.dictionaries(
        st.sampled_from(["weight", *(f"weight_{x}" for x in ("packed", "scale", "shape", "zero_point", "g_idx"))]),
        st.tuples(st.sampled_from(sorted(foreign.NAMES)), st.lists(st.integers(0, 40), max_size=3)),
        max_size=2,
    ),
)  # fmt: skip
def test_damage_is_an_error_of_ours(arguments: Any, inputs: Any, top: Any, shapes: Any, tmp_path: Path) -> None:
    tensors = dict(SOUND)
    name = "model.layers.0.mlp.up_proj"
    for part, (dtype, shape) in shapes.items():
        tensors[f"{name}.{part}"] = (dtype, np.full(shape, 3))
    folder = foreign.write(tmp_path / "m", tensors, config({**weights(4), **arguments}, inputs, **top))
    with suppress(GossamerError):  # and no other
        checkpoint = open_checkpoint(folder)
        checkpoint.pack(checkpoint.topology.site(name)).validate(name)
