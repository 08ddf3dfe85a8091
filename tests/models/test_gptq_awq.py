"""GPTQ and AWQ folders open as expressions whose codes and scales are those that were packed."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import foreign
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gossamer import LLM
from gossamer.errors import CheckpointError, GossamerError, UnsupportedError
from gossamer.models.checkpoint import Checkpoint, open_checkpoint


class Layers:
    """Makes the tensors of layers and remembers what they mean: W = s (q - z) in float32."""

    def __init__(
        self, bits: int, group: int, *, version: int = 1, order: bool = False, symmetric: bool = False
    ) -> None:
        self.bits, self.group, self.version, self.order, self.symmetric = bits, group, version, order, symmetric
        self.made: list[np.ndarray] = []

    def parts(self, rows: int, cols: int, rng: Any) -> tuple[np.ndarray, ...]:
        group = cols if self.group == -1 else self.group
        groups = -(-cols // group)
        codes = rng.integers(0, 1 << self.bits, (rows, cols))
        zeros = rng.integers(1, 1 << self.bits, (rows, groups))
        if self.symmetric:
            zeros[:] = 1 << (self.bits - 1)
        scales = (rng.standard_normal((rows, groups)) / 50).astype(np.float16)
        g_idx = np.arange(cols) // group
        if self.order:
            g_idx = rng.permutation(g_idx)
        s, z = scales.astype(np.float32)[:, g_idx], zeros[:, g_idx].astype(np.float32)
        self.made.append((codes.astype(np.float32) - z) * s)
        return codes, zeros, scales, g_idx

    def gptq(self, rows: int, cols: int, rng: Any) -> dict[str, Any]:
        codes, zeros, scales, g_idx = self.parts(rows, cols, rng)
        return foreign.gptq(codes, zeros, scales, self.bits, offset=2 - self.version, g_idx=g_idx)

    def awq(self, rows: int, cols: int, rng: Any) -> dict[str, Any]:
        codes, zeros, scales, _ = self.parts(rows, cols, rng)
        return foreign.awq(codes, zeros, scales)


def config(bits: int, group: int, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False, "sym": False, **more}


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def check(checkpoint: Checkpoint, layers: Layers, expression: str) -> None:
    linear = [s for s in checkpoint.topology.sites if s.role not in ("embed", "head")]
    for site, w in zip(linear, layers.made, strict=True):
        assert str(checkpoint.native(site)) == expression
        packed = checkpoint.pack(site)
        packed.validate(site.name)
        assert np.array_equal(packed.decode(), w), site.name
        assert np.array_equal(checkpoint.source(site).read(3, 21), w[3:21])


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq(bits: int, version: int, tmp_path: Path) -> None:
    layers = Layers(bits, 32, version=version)
    layout = "gptq" if version == 1 else "gptq_v2"
    folder = foreign.write(tmp_path / "m", foreign.model(layers.gptq), config(bits, 32, checkpoint_format=layout))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.kind == "gptq"
    check(checkpoint, layers, f"uint{bits}/g32")


def test_gptq_symmetric_and_whole_rows(tmp_path: Path) -> None:
    layers = Layers(4, -1, symmetric=True)
    check(
        open_checkpoint(foreign.write(tmp_path / "m", foreign.model(layers.gptq), config(4, -1))),
        layers,
        "int4/row*f16",
    )


def test_gptq_with_activation_order(tmp_path: Path) -> None:
    layers = Layers(4, 32, order=True)
    folder = foreign.write(tmp_path / "m", foreign.model(layers.gptq), config(4, 32, desc_act=True))
    check(open_checkpoint(folder), layers, "permute(uint4/g32)")


def test_gptq_runs(tmp_path: Path) -> None:
    layers = Layers(4, 32, order=True)
    folder = foreign.write(tmp_path / "m", foreign.model(layers.gptq), config(4, 32))
    tokens = [1, 5, 40, 7, 7, 3]
    mine = LLM(folder, format="permute(uint4/g32) @ f32", keep=[("embed", "f32 @ f32"), ("head", "f32 @ f32")])
    plain = LLM(folder, format="f32 @ f32")
    assert np.abs(mine.logits(tokens) - plain.logits(tokens)).max() < 1e-4


def test_awq(tmp_path: Path) -> None:
    layers = Layers(4, 32)
    checkpoint = open_checkpoint(foreign.write(tmp_path / "m", foreign.model(layers.awq), AWQ))
    assert checkpoint.kind == "awq"
    check(checkpoint, layers, "uint4/g32")


def test_biases_of_zeros_are_passed_over(tmp_path: Path) -> None:
    layers = Layers(4, 32)
    tensors = foreign.model(layers.gptq)
    bias = "model.layers.0.mlp.up_proj.bias"
    tensors[bias] = ("F16", np.zeros(96))
    check(open_checkpoint(foreign.write(tmp_path / "m", tensors, config(4, 32))), layers, "uint4/g32")
    tensors[bias] = ("F16", np.ones(96))
    with pytest.raises(UnsupportedError, match="does not use"):
        open_checkpoint(foreign.write(tmp_path / "n", tensors, config(4, 32)))


REFUSED = {
    "has weights of 5 bits": config(5, 32),
    "layout 'marlin'": config(4, 32, checkpoint_format="marlin"),
    "quantizes with 'dynamic'": config(4, 32, dynamic={"+:.*": {"bits": 8}}),
    "packs its weights into 'int64'": config(4, 32, pack_dtype="int64"),
    "layout 'gemv'": {**AWQ, "version": "gemv"},
    "without zero points": {**AWQ, "zero_point": False},
    "quantized by 'bitsandbytes'": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "groups that are not read": config(4, 8),
}


@pytest.mark.parametrize(("words", "quantization"), REFUSED.items())
def test_other_schemes_are_refused_by_name(words: str, quantization: dict[str, Any], tmp_path: Path) -> None:
    layers = Layers(4, quantization.get("group_size", 32))
    with pytest.raises(UnsupportedError, match=words):
        open_checkpoint(foreign.write(tmp_path / "m", foreign.model(layers.gptq), quantization))


def test_groups_of_unequal_size_are_refused(tmp_path: Path) -> None:
    tensors = foreign.model(Layers(4, 32).gptq)
    tensors["model.layers.0.mlp.up_proj.g_idx"] = ("I32", np.array([0] * 31 + [1] * 33))
    with pytest.raises(UnsupportedError, match="does not give each group 32 columns"):
        open_checkpoint(foreign.write(tmp_path / "m", tensors, config(4, 32)))


def test_a_zero_point_that_programs_read_differently_is_refused(tmp_path: Path) -> None:
    tensors = foreign.model(Layers(4, 32).gptq)
    tensors["model.layers.0.mlp.up_proj.qzeros"] = ("I32", np.full((2, 12), -1))
    with pytest.raises(UnsupportedError, match="stores the zero point 15"):
        open_checkpoint(foreign.write(tmp_path / "m", tensors, config(4, 32)))


def test_an_infinite_scale_is_refused(tmp_path: Path) -> None:
    tensors = foreign.model(Layers(4, 32).gptq)
    name = "model.layers.0.mlp.up_proj"
    tensors[f"{name}.scales"][1][1, 5] = np.inf
    checkpoint = open_checkpoint(foreign.write(tmp_path / "m", tensors, config(4, 32)))
    with pytest.raises(CheckpointError, match="NaN or an infinity"):
        checkpoint.pack(checkpoint.topology.site(name))


SOUND = {m: foreign.model(getattr(Layers(4, 32), m)) for m in ("gptq", "awq")}  # made once: it is the slow part
values = st.one_of(
    st.none(), st.booleans(), st.integers(-(1 << 70), 1 << 70), st.floats(), st.text(max_size=5),
    st.lists(st.integers(), max_size=3), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)  # fmt: skip
SLOW = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@settings(max_examples=50, deadline=None, suppress_health_check=SLOW)
@given(
    method=st.sampled_from(["gptq", "awq"]),
    keys=st.dictionaries(
        st.sampled_from(["bits", "group_size", "checkpoint_format", "version", "zero_point", "pack_dtype", "dynamic"]),
        values,
        max_size=3,
    ),
    shapes=st.dictionaries(
        st.sampled_from(["qweight", "qzeros", "scales", "g_idx"]),
        st.tuples(st.sampled_from(sorted(foreign.NAMES)), st.lists(st.integers(0, 40), max_size=3)),
        max_size=2,
    ),
)
def test_damage_is_an_error_of_ours(method: str, keys: dict[str, Any], shapes: dict[str, Any], tmp_path: Path) -> None:
    tensors = dict(SOUND[method])
    name = "model.layers.0.mlp.up_proj"
    for part, (dtype, shape) in shapes.items():
        tensors[f"{name}.{part}"] = (dtype, np.full(shape, 3))
    quantization = {**(AWQ if method == "awq" else config(4, 32)), **keys}
    folder = foreign.write(tmp_path / "m", tensors, quantization)
    with suppress(GossamerError):  # and no other
        checkpoint = open_checkpoint(folder)
        checkpoint.pack(checkpoint.topology.site(name)).validate(name)
