"""The ``quantization_config`` of compressed-tensors: which sites it means, and how their weights and inputs are coded.

A configuration has groups; each has targets (module names, regular expressions after "re:", class names) and
arguments for weights and inputs. Both directions are here: ``Scheme.read`` takes a group apart, ``arguments`` and
``input_arguments`` put a format into these words. Reference: the compressed-tensors project's QuantizationConfig.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gossamer.checkpoints.safetensors import quote
from gossamer.errors import CheckpointError, UnsupportedError
from gossamer.formats.coded import Coded
from gossamer.formats.inputs import DEFAULT_INPUT, InputFormat

__all__ = ["Arguments", "Scheme", "arguments", "input_arguments", "matches", "read_config", "scheme_of"]

FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
_ARGUMENTS = {
    *("num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "actorder"),
    *("scale_dtype", "zp_dtype", "observer", "observer_kwargs"),
}
_PASSED_OVER = {"global_compression_ratio", "quant_method", "version"}
_MAX_PATTERN, _MAX_REPEATS, _MAX_TARGETS = 200, 4, 100_000


@dataclass(frozen=True)
class Arguments:
    """How one tensor is coded: ``kind`` "int" or "float"; ``strategy`` tensor, channel, group, block or token."""

    bits: int
    kind: str
    symmetric: bool
    strategy: str
    group: int | None
    block: tuple[int, int] | None
    dynamic: bool


@dataclass(frozen=True)
class Scheme:
    """A group of the configuration. ``inputs`` None: inputs are not quantized."""

    targets: tuple[str, ...]
    format: str
    weights: Arguments
    inputs: Arguments | None

    def input(self, where: str, static: float | None) -> InputFormat:
        """The input format; ``static``: the stored scale, where it is fixed."""
        a = self.inputs
        if a is None:
            return DEFAULT_INPUT
        number = "e4m3" if a.kind == "float" else f"{'' if a.symmetric else 'u'}int{a.bits}"
        if static is not None:
            return InputFormat(number, float(static))
        return InputFormat(number, "token" if a.group is None else a.group)


def read_config(config: Mapping[str, Any], where: str) -> tuple[list[Scheme], tuple[str, ...]]:
    """The groups of a ``quantization_config``, and the targets to leave alone.

    CheckpointError: an entry of the wrong type; UnsupportedError: a scheme that is not read, named.
    """
    known = {"config_groups", "format", "quantization_status", "ignore", *_PASSED_OVER}
    for key, value in config.items():
        if key not in known and value not in (None, {}, [], "dense") and not _is_dense(value):
            raise UnsupportedError(f"{where} quantizes with '{key[:40]}', which is not read.")
    status = config.get("quantization_status", "compressed")
    if status not in ("compressed", "frozen"):
        raise UnsupportedError(f"{where} has weights whose quantization status is {quote(status)}, not 'compressed'.")
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise CheckpointError(f"{where} has no 'config_groups' that say how the weights are quantized; check the file.")
    overall = config.get("format")
    schemes = [_scheme(name, group, overall, where) for name, group in groups.items()]
    ignore = _targets(config.get("ignore") or [], f"{where} ('ignore')")
    if len(ignore) + sum(len(s.targets) for s in schemes) > _MAX_TARGETS:
        raise CheckpointError(f"{where} names more than {_MAX_TARGETS} targets; check the file.")
    return schemes, ignore


def _is_dense(value: Any) -> bool:
    """A sparsity that is none."""
    return isinstance(value, dict) and value.get("format") == "dense"


def _scheme(name: str, group: Any, overall: Any, where: str) -> Scheme:
    where = f"{where} (group {quote(name)})"
    if not isinstance(group, dict):
        raise UnsupportedError(f"{where} is no list of arguments; presets by name are not read.")
    if group.get("output_activations") is not None:
        raise UnsupportedError(f"{where} quantizes outputs, which is not read.")
    weights, inputs = _arguments(group.get("weights"), where), _arguments(group.get("input_activations"), where)
    if weights is None:
        raise UnsupportedError(f"{where} quantizes inputs alone, which is not read.")
    stored = group.get("format") or overall
    if stored not in FORMATS:
        raise UnsupportedError(f"{where} is stored as {quote(stored)}; read are {', '.join(FORMATS)}.")
    scheme = Scheme(_targets(group.get("targets"), where), str(stored), weights, inputs)
    _check_weights(scheme, where)
    if inputs is not None:
        _check_inputs(inputs, where)
    return scheme


def _targets(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise CheckpointError(f"{where} has targets that are no list of names; check the file.")
    for target in value:
        if target.startswith("re:"):
            _pattern(target, where)
    return tuple(value)


def _arguments(value: Any, where: str) -> Arguments | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} has arguments {quote(value)}, which should be an object in braces.")
    if unknown := sorted(set(value) - _ARGUMENTS, key=str):
        raise UnsupportedError(f"{where} has the argument {quote(unknown[0])}, which is not known here.")

    def get(key: str, kinds: tuple[type, ...], default: Any) -> Any:
        found = value.get(key)
        if found is None:
            return default
        if not isinstance(found, kinds) or (isinstance(found, bool) and bool not in kinds):
            raise CheckpointError(f"{where} has '{key}' = {quote(found)}, which is of the wrong type.")
        return found

    group, block = get("group_size", (int,), None), get("block_structure", (list, str), None)
    default = "tensor" if group is None else "channel" if group == -1 else "group"
    strategy = get("strategy", (str,), default)
    if isinstance(block, str):
        block = [int(x) if x.isdecimal() and len(x) < 9 else 0 for x in block.split("x")]
    if block is not None and (len(block) != 2 or not all(type(x) is int and 0 < x < 1 << 28 for x in block)):
        raise CheckpointError(f"{where} has 'block_structure' = {quote(block)}, which should be two sizes.")
    if group is not None and (group < -1 or group == 0 or group > 1 << 28):
        raise CheckpointError(f"{where} has 'group_size' = {quote(group)}, which cannot be right; check the file.")
    if (strategy == "group") != (group is not None and group > 0) or (strategy == "block") != (block is not None):
        raise CheckpointError(f"{where} has the strategy {quote(strategy)} without its size; check the file.")
    dynamic = get("dynamic", (bool, str), False)
    if isinstance(dynamic, str):
        raise UnsupportedError(f"{where} has 'dynamic' = {quote(dynamic)}, which is not read.")
    get("actorder", (bool, str), None)  # where columns stand is read from their tensor
    return Arguments(
        bits=get("num_bits", (int,), 8),
        kind=get("type", (str,), "int"),
        symmetric=get("symmetric", (bool,), True),
        strategy=strategy,
        group=group if strategy == "group" else None,
        block=None if block is None else (block[0], block[1]),
        dynamic=dynamic,
    )


def _check_weights(scheme: Scheme, where: str) -> None:
    a = scheme.weights
    integer, float8 = a.kind == "int" and 2 <= a.bits <= 8, a.kind == "float" and a.bits == 8 and a.symmetric
    fits = {
        "pack-quantized": integer,
        "int-quantized": integer and a.bits == 8,
        "float-quantized": float8,
        "naive-quantized": float8 or (integer and a.bits == 8),
    }
    if not fits[scheme.format]:
        raise UnsupportedError(f"{where} has weights of {_words(a)} stored as '{scheme.format}', which are not read.")
    strategies = ("tensor", "channel", "group") if a.kind == "int" else ("tensor", "channel", "group", "block")
    if a.strategy not in strategies or a.dynamic:
        raise UnsupportedError(f"{where} has weights with the strategy {quote(a.strategy)}, which is not read.")


def _check_inputs(a: Arguments, where: str) -> None:
    ok = (a.kind == "int" and a.bits in (4, 8)) or (a.kind == "float" and a.bits == 8 and a.symmetric)
    static = a.strategy == "tensor" and not a.dynamic and a.symmetric
    dynamic = a.dynamic and (a.strategy == "token" or (a.strategy == "group" and (a.group or 0) % 16 == 0))
    if not ok or not (static or dynamic):
        how = "dynamic" if a.dynamic else "static"
        raise UnsupportedError(
            f"{where} has {how} inputs of {_words(a)} for each {quote(a.strategy)}, which are not read."
        )


def _words(a: Arguments) -> str:
    return f"{quote(a.bits)} bits of type {quote(a.kind)}{'' if a.symmetric else ' with zero points'}"


# ------------------------------------------------------------ targets


def scheme_of(name: str, kind: str, schemes: list[Scheme], ignore: tuple[str, ...]) -> Scheme | None:
    """The scheme of the module ``name`` of class ``kind``: exact names come first, then patterns, then classes."""
    if any(matches(name, kind, target) for target in ignore):
        return None
    by_target = {target: scheme for scheme in schemes for target in scheme.targets}
    order = sorted(by_target, key=lambda target: (target.startswith("re:"), target))
    for target in order:
        if target != kind and matches(name, kind, target):
            return by_target[target]
    return by_target.get(kind)


def matches(name: str, kind: str, target: str) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], name) is not None
    return target in (name, kind)


def _pattern(target: str, where: str) -> None:
    """Refuses patterns that could run for ever: a pattern comes from a stranger."""
    text = target[3:]
    repeats = len(re.findall(r"(?<!\\)[*+{]", text))
    if len(text) > _MAX_PATTERN or repeats > _MAX_REPEATS or re.search(r"\)[*+{]|\\\d|\(\?[^:]", text):
        raise UnsupportedError(f"{where} names its targets by {quote(text)}, a pattern of more kinds than are read.")
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError):
        raise CheckpointError(
            f"{where} names its targets by {quote(text)}, which is no pattern; check the file."
        ) from None


# ------------------------------------------------------------ the other direction


def arguments(fmt: Coded) -> tuple[str, dict[str, Any]] | None:
    """(storage format, arguments of the weights) that say what ``fmt`` stores, or None where nothing does."""
    number, group = fmt.number, fmt.group
    if fmt.scale not in ("f16", "bf16", "f32") or fmt.minimum is not None:
        return None
    if number.family in ("int", "uint"):
        if number.family == "uint" and not fmt.zero:
            return None
        stored, kind = "pack-quantized", "int"
    elif number.name == "e4m3":
        stored, kind = "float-quantized", "float"
    else:
        return None
    found: dict[str, Any] = {"num_bits": number.bits, "type": kind, "symmetric": not fmt.zero, "dynamic": False}
    if group.rows == 1:
        strategy = "channel" if group.cols is None else "group"
    else:
        strategy = "tensor" if group.rows is None else "block"
    if strategy == "block":
        if kind == "int" or group.cols is None:
            return None
        found["block_structure"] = [group.rows, group.cols]
    if strategy == "tensor" and fmt.zero:  # ours are one a row
        return None
    return stored, {**found, "strategy": strategy, **({"group_size": group.cols} if strategy == "group" else {})}


def input_arguments(x: InputFormat) -> dict[str, Any] | None:
    """The arguments of the inputs, {} for inputs that are not quantized, or None where nothing says them."""
    if not x.quantized:
        return {}
    fixed, float8, symmetric = isinstance(x.group, float), x.number == "e4m3", not x.number.startswith("u")
    if x.outlier is not None or (fixed and not symmetric):
        return None
    group = {"group_size": x.group} if isinstance(x.group, int) else {}
    return {
        "num_bits": 8 if float8 else int(x.number.removeprefix("u")[3:]),
        "type": "float" if float8 else "int",
        "symmetric": symmetric,
        "strategy": "tensor" if fixed else "group" if group else "token",
        "dynamic": not fixed,
        **group,
    }
