"""Several examples in one row: nothing is padded, and no example sees another.

    ids        [ first example | second      | third     ]
    positions    0 1 2 ... n     0 1 2 ... m   0 1 2 ...

No mask is passed. From positions that start over, transformers makes the mask that the attention implementation takes
(blocks for sdpa and eager, within sliding windows where there are any; bounds of variable length for flash attention).
Whether a model's own code does so is found out by trying.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from introspect_ray.explainer.encoding import Encoded
from introspect_ray.explainer.model import Explainer
from introspect_ray.interventions.selfcheck import TOLERANCE
from introspect_ray.models.structure import text_config

logger = logging.getLogger(__name__)

CHECK_LENGTHS = (6, 9, 7)


def joined(examples: Sequence[Encoded]) -> Encoded:
    """The examples end to end in one row."""
    ids: list[int] = []
    loss_mask: list[bool] = []
    vector_positions: list[int] = []
    starts: list[int] = []
    for one in examples:
        vector_positions += [len(ids) + position for position in one.vector_positions]
        starts += [len(ids) + start for start in one.starts]
        ids += one.ids
        loss_mask += one.loss_mask
    vectors = tuple(vector for one in examples for vector in one.vectors)
    return Encoded(ids, loss_mask, vector_positions, vectors, tuple(starts))


def can_pack(explainer: Explainer) -> bool:
    """Whether three small examples get the same logits in one row as alone; the reason is logged if not.

    Gradients are switched on: a first pass without them makes bitsandbytes repack weights, which breaks sharding. Where
    the weights are sharded over processes, all of them must call this.
    """
    reason = _difference(explainer)
    if reason:
        logger.warning("examples are padded, not packed, for %s: %s", type(explainer.causal).__name__, reason)
    return not reason


def _difference(explainer: Explainer) -> str:
    vocabulary = text_config(explainer.causal).vocab_size
    examples = [_made_up(length, vocabulary) for length in CHECK_LENGTHS]
    whole = joined(examples)
    try:
        with torch.enable_grad(), explainer.evaluating():
            alone = torch.cat([_logits(explainer, [one]) for one in examples])
            packed = _logits(explainer, [whole])
            mixed = _logits(explainer, [Encoded(whole.ids, whole.loss_mask, [], ())])
    except Exception as error:  # what a model's own code says to positions that start over cannot be foreseen
        return f"{type(error).__name__}: {error}"
    effect = (mixed.float() - alone.float()).abs().max().item()
    difference = (packed.float() - alone.float()).abs().max().item()
    # The dtype that was computed in, which need not be the weights' own.
    if difference <= TOLERANCE.get(packed.dtype, 0.0) * effect:
        return ""
    return f"logits differ by {difference:.2g} where seeing each other makes a difference of {effect:.2g}"


def _made_up(length: int, vocabulary: int) -> Encoded:
    """Any ids; all but the first count as the answer."""
    ids = [(7 * place + 3 + length) % vocabulary for place in range(length)]
    return Encoded(ids, [False] + [True] * (length - 1), [], ())


def _logits(explainer: Explainer, batch: Sequence[Encoded]) -> Tensor:
    """Logits of all answers, as the loss computes them: sharded weights are whole only within that call."""
    head = explainer.causal.get_output_embeddings()
    if head is None:
        raise NotImplementedError("it has no separate language-model head")
    found: list[Tensor] = []
    handle = head.register_forward_hook(lambda _module, _inputs, logits: found.append(logits.detach().flatten(0, -2)))
    try:
        explainer.loss(batch)
    finally:
        handle.remove()
    return found[0]
