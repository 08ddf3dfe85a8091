"""The gradient of a model's loss for every linear map of its layers, without torch: a float32 reverse pass.

One sequence at a time. A layer's activations are kept as long as they fit into ``KEPT`` bytes, and computed again from
its input where they do not; weights are kept where the whole model fits, and read again layer by layer where not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from gossamer.compress.reverse_layer import Activations, ReverseLayer, Visit, norm, norm_back
from gossamer.errors import UsageError
from gossamer.limits import available_memory
from gossamer.models.checkpoint import Checkpoint
from gossamer.models.layerwise import check_tokens, layer_vectors, unpack_layer
from gossamer.models.load import Progress
from gossamer.models.topology import Site

__all__ = ["Reverse", "Visit", "fisher_labels", "sweep"]

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]

KEPT = 1 << 30  # bytes of activations in memory at once
_LOGITS = 128 << 20  # bytes of logits in memory at once
_COLUMNS = 16384  # of the vocabulary, multiplied with the head's weights at once


class Reverse:
    """A model whose loss is differentiated. Not for several threads at once.

    Raises UnsupportedError for an activation whose derivative is not known.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.config = checkpoint, checkpoint.config
        topology = checkpoint.topology
        self._sites = [[s for s in topology.sites if s.layer == i] for i in range(self.config.layers)]
        head = topology.site("model.embed_tokens" if self.config.tied else "lm_head")
        self._head = np.ascontiguousarray(checkpoint.source(head).read(0, head.rows), np.float32)
        checkpoint.release(head)
        self._head_bias = checkpoint.bias(head)
        self._embedding = self._head
        if not self.config.tied:
            table = topology.site("model.embed_tokens")
            self._embedding = np.ascontiguousarray(checkpoint.source(table).read(0, table.rows), np.float32)
            checkpoint.release(table)
        self._final = checkpoint.vector(next(v for v in topology.vectors if v.role == "final_norm"))
        blocks = 4 * sum(s.rows * s.cols for sites in self._sites for s in sites)
        free = available_memory()
        self._keep = free is None or blocks <= free // 2
        self._layers: dict[int, ReverseLayer] = {}
        self._layer(0)  # what is not supported is refused now

    def _layer(self, index: int) -> ReverseLayer:
        if index in self._layers:
            return self._layers[index]
        if not self._keep:
            self._layers.clear()
        sites = self._sites[index]
        biases = {s.name: b for s in sites if (b := self.checkpoint.bias(s)) is not None}
        weights, vectors = unpack_layer(self.checkpoint, index), layer_vectors(self.checkpoint, index)
        layer = self._layers[index] = ReverseLayer(self.config, sites, weights, biases, vectors)
        return layer

    def run(self, tokens: I32, labels: Literal["next"] | I32, visit: Visit) -> float:
        """The loss of one sequence, in nats: the mean over its labelled positions of -log p(label).

        ``tokens`` are int32 [n], from an empty context; ``labels`` int32 [n] are what each position shall predict, -1
        for no label, and "next" stands for the next token (the last position has none). ``visit(site, x, dy)`` is told,
        for every linear site of the layers, its input float32 [n, cols] and the gradient of the loss for its output
        [n, rows], so that the gradient for its weights is dy^T x; from the last layer to the first.

        Raises UsageError for tokens or labels that the model does not have, or where no position has a label.
        """
        targets = self._targets(tokens, labels)
        inputs, kept, h = self._forward(tokens)
        loss, dh = self._loss(h, targets)
        for index in range(self.config.layers - 1, -1, -1):
            layer, s = self._layer(index), kept.pop(index, None)
            if s is None:
                _, s = layer.forward(inputs[index])
            dh = layer.backward(dh, s, visit, first=index == 0)
        return loss

    def _targets(self, tokens: I32, labels: Literal["next"] | I32) -> I32:
        check_tokens([tokens], self.config)
        if isinstance(labels, str):
            targets = np.append(tokens[1:], -1).astype(np.int32)
        else:
            targets = labels
        if targets.shape != tokens.shape or targets.max() >= self.config.vocab or targets.min() < -1:
            raise UsageError(
                f"labels of shape {list(targets.shape)} up to {targets.max(initial=-1)} were given for "
                f"{len(tokens)} tokens; give one for each, below {self.config.vocab}, or -1 for none."
            )
        if (targets < 0).all():
            raise UsageError(f"a sequence of {len(tokens)} tokens has no label; give a longer one or labels.")
        return targets

    def _forward(self, tokens: I32) -> tuple[list[F32], dict[int, Activations], F32]:
        """The inputs of all layers, the activations of those that fit, and the last hidden states."""
        h = self._embedding[tokens] * np.float32(self.config.embed_scale)
        inputs: list[F32] = []
        kept: dict[int, Activations] = {}
        room = KEPT // Activations.bytes(self.config, len(tokens))
        for index in range(self.config.layers):
            inputs.append(h)
            h, s = self._layer(index).forward(h)
            if index >= self.config.layers - room:
                kept[index] = s
        return inputs, kept, h

    # ------------------------------------------------------------ the loss

    def _rows(self, n: int) -> list[slice]:
        step = max(1, _LOGITS // (4 * self.config.vocab))
        return [slice(r, min(n, r + step)) for r in range(0, n, step)]

    def _logits(self, x: F32) -> F32:
        logits: F32 = x @ self._head.T
        if self._head_bias is not None:
            logits += self._head_bias
        return logits

    def _loss(self, h: F32, targets: I32) -> tuple[float, F32]:
        """The loss and d(h): some rows of logits at a time."""
        eps, labelled = self.config.norm_eps, targets >= 0
        x = norm(h, self._final, eps)
        dx = np.zeros(x.shape, np.float32)
        total, count = 0.0, int(labelled.sum())
        for rows in self._rows(len(h)):
            p, used, label = self._logits(x[rows]), labelled[rows], np.maximum(targets[rows], 0)
            at = np.arange(len(p)), label
            p -= p.max(axis=1, keepdims=True)
            log_p = p[at].astype(np.float64)
            np.exp(p, out=p)
            sums = p.sum(axis=1, dtype=np.float64)
            total += float((np.log(sums) - log_p)[used].sum())
            p /= sums[:, None].astype(np.float32)
            p[at] -= 1
            p *= np.where(used, np.float32(1 / count), np.float32(0))[:, None]
            for c in range(0, p.shape[1], _COLUMNS):
                dx[rows] += p[:, c : c + _COLUMNS] @ self._head[c : c + _COLUMNS]
        return total / count, norm_back(dx, h, self._final, eps)

    def sample(self, tokens: I32, seed: int) -> I32:
        """For each position a token drawn from the model's own prediction there, int32 [n]."""
        check_tokens([tokens], self.config)
        h = self._embedding[tokens] * np.float32(self.config.embed_scale)
        for index in range(self.config.layers):
            h, _ = self._layer(index).forward(h)
        x = norm(h, self._final, self.config.norm_eps)
        random = np.random.default_rng(seed)
        out = np.empty(len(tokens), np.int32)
        for rows in self._rows(len(x)):
            p = self._logits(x[rows])
            p -= p.max(axis=1, keepdims=True)
            np.exp(p, out=p)
            for i, row in enumerate(p, rows.start):
                sums = np.cumsum(row, dtype=np.float64)
                out[i] = min(int(np.searchsorted(sums, random.random() * sums[-1], side="right")), len(row) - 1)
        return out


def fisher_labels(reverse: Reverse, tokens: I32, seed: int = 0) -> I32:
    """Labels for the Fisher information itself, int32 [n]: drawn from the model's own predictions (one forward pass).

    With the text's own next tokens as labels, squares of gradients give the "empirical Fisher" instead, which is
    something else (Kunstner, Balles and Hennig 2019).
    """
    return reverse.sample(tokens, seed)


def sweep(
    checkpoint: Checkpoint,
    sequences: Sequence[I32],
    visitors: Sequence[Visit],
    *,
    sampled: int | None = None,
    progress: Progress | None = None,
) -> list[float]:
    """Runs every sequence, int32 [n] each, and shows its gradients to all ``visitors``; the losses, in nats.

    Labels are the next tokens, or drawn from the model's predictions with the seed ``sampled``. ``progress`` is told
    the sequences done and in all. Raises as ``Reverse.run`` does.
    """
    reverse, losses = Reverse(checkpoint), []

    def visit(site: Site, x: F32, dy: F32) -> None:
        for visitor in visitors:
            visitor(site, x, dy)

    for done, tokens in enumerate(sequences):
        labels: Literal["next"] | I32 = "next"
        if sampled is not None:
            labels = fisher_labels(reverse, tokens, sampled + done)
        losses.append(reverse.run(tokens, labels, visit))
        if progress:
            progress(done + 1, len(sequences))
    return losses
