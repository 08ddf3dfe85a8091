"""Sites to allocate formats for."""

from __future__ import annotations

from gossamer.models.topology import Site


def site(name="a", role="q", rows=64, cols=128, layer=0):
    return Site(name, role, layer, rows, cols, f"{name}.input")


def block(layer=0, hidden=64, ffn=128):
    """The seven linear sites of a layer."""
    base = f"model.layers.{layer}"
    shapes = {"q": (hidden, hidden), "k": (32, hidden), "v": (32, hidden), "o": (hidden, hidden)}
    shapes |= {"gate": (ffn, hidden), "up": (ffn, hidden), "down": (hidden, ffn)}
    return [
        site(f"{base}.{'self_attn' if role in 'qkvo' else 'mlp'}.{role}_proj", role, *shape, layer)
        for role, shape in shapes.items()
    ]
