"""The sparse code of a layer with some of its latents replaced, and what it decodes to.

A code is the list of its non-zero latents (`ActiveLatents`), ordered by vector and then by latent; all F latents of all
vectors are never held at once. N vectors, F latents, S chosen latents, D_in width read, D_out width written.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from introspect_ray.features.coder import ActiveLatents, SparseCoder

ENTRIES_AT_ONCE = 1 << 23
"""Simulated values of chosen latents that are turned into entries at a time (64 MB of keys)."""


def decode(coder: SparseCoder, code: ActiveLatents, x: Float[Tensor, "N D_in"]) -> Float[Tensor, "N D_out"]:
    """`coder.decode` of a code that is given by its entries: latents, bias, and the skip term of the true input `x`."""
    values = code.values.to(coder.decoder.dtype)
    if coder.rescale:
        values = values / coder.decoder.norm(dim=-1)[code.latents]
    starts = torch.searchsorted(code.vectors, torch.arange(code.num_vectors, device=code.vectors.device))
    if len(code):
        output = torch.nn.functional.embedding_bag(
            code.latents, coder.decoder, starts, mode="sum", per_sample_weights=values
        )
    else:
        output = coder.decoder.new_zeros(code.num_vectors, coder.width)
    output = output + coder.decoder_bias
    return output if coder.skip is None else output + x.to(coder.skip.dtype) @ coder.skip.T


def empty(code: ActiveLatents) -> ActiveLatents:
    """The same vectors with no latent active."""
    return _kept(code, torch.zeros_like(code.latents, dtype=torch.bool))


def without(code: ActiveLatents, chosen: Int[Tensor, " S"]) -> ActiveLatents:
    """The code with the chosen latents at zero."""
    return _kept(code, ~torch.isin(code.latents, chosen))


def replaced(
    code: ActiveLatents, chosen: Int[Tensor, " S"], simulated: Float[Tensor, "N S"], top_k: int | None
) -> ActiveLatents:
    """The chosen latents at their simulated values, all others as they truly are.

    Args:
        simulated: column j belongs to `chosen[j]`; `nan` keeps the true value, because there is no simulated one.
        top_k: of each vector only the k largest stay (P2 re-applies its coder's k); none keeps all.
    """
    assert simulated.shape == (code.num_vectors, len(chosen)), (simulated.shape, code.num_vectors, len(chosen))
    if not len(chosen):
        return code if top_k is None else largest(code, top_k)
    parts = [
        _replaced(vectors_of(code, start, stop), chosen, simulated[start:stop])
        for start, stop in _spans(code.num_vectors, len(chosen))
    ]
    whole = joined(parts)
    return whole if top_k is None else largest(whole, top_k)


def vectors_of(code: ActiveLatents, start: int, stop: int) -> ActiveLatents:
    """Vectors `[start, stop)` as a code of their own, counted from 0."""
    bounds = torch.tensor([start, stop], device=code.vectors.device)
    first, last = torch.searchsorted(code.vectors, bounds).tolist()
    part = slice(first, last)
    return ActiveLatents(
        code.vectors[part] - start, code.latents[part], code.values[part], stop - start, code.num_latents
    )


def columns_of(code: ActiveLatents, chosen: Int[Tensor, " S"]) -> Float[Tensor, "N S"]:
    """True values of the chosen latents, zeros included."""
    order = chosen.argsort()
    place = torch.searchsorted(chosen[order], code.latents).clamp(max=max(0, len(chosen) - 1))
    dense = code.values.new_zeros(code.num_vectors, len(chosen))
    if len(chosen):
        found = chosen[order][place] == code.latents
        dense[code.vectors[found], order[place[found]]] = code.values[found]
    return dense


def largest(code: ActiveLatents, k: int) -> ActiveLatents:
    """The k largest latents of each vector; of equal ones the lower index."""
    order = torch.sort(code.values, descending=True, stable=True).indices
    order = order[torch.sort(code.vectors[order], stable=True).indices]
    starts = torch.searchsorted(code.vectors, torch.arange(code.num_vectors, device=code.vectors.device))
    rank = torch.arange(len(code), device=order.device) - starts[code.vectors[order]]
    stays = torch.zeros(len(code), dtype=torch.bool, device=order.device)
    stays[order[rank < k]] = True
    return _kept(code, stays)


def joined(parts: Sequence[ActiveLatents]) -> ActiveLatents:
    """Codes one after the other as one."""
    firsts = accumulate([0, *(part.num_vectors for part in parts)])
    return ActiveLatents(
        torch.cat([part.vectors + first for part, first in zip(parts, firsts, strict=False)]),
        torch.cat([part.latents for part in parts]),
        torch.cat([part.values for part in parts]),
        sum(part.num_vectors for part in parts),
        parts[0].num_latents,
    )


def moved(code: ActiveLatents, live: Int[Tensor, " L"], seed: int) -> ActiveLatents:
    """Every vector keeps its values, on latents drawn from `live` at random: as many active, all meaningless.

    Within a vector no latent is drawn twice, because each vector takes a run of a shuffled list from its own start.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled = live[torch.randperm(len(live), generator=generator).to(live.device)]
    starts = torch.randint(len(live), (code.num_vectors,), generator=generator).to(live.device)
    first = torch.searchsorted(code.vectors, torch.arange(code.num_vectors, device=code.vectors.device))
    rank = torch.arange(len(code), device=code.vectors.device) - first[code.vectors]
    latents = shuffled[(starts[code.vectors] + rank) % len(live)]
    order = (code.vectors * code.num_latents + latents).argsort()
    return ActiveLatents(code.vectors, latents[order], code.values[order], code.num_vectors, code.num_latents)


def paper_random(code: ActiveLatents, live: Int[Tensor, " L"], count: int, seed: int) -> ActiveLatents:
    """P2's random latents as coded: each vector gets `count` random latents, all at one value, the *number* of the
    vector's first active latent where its activation was meant; a vector without active latents gets none."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for vector in code.vectors.unique().tolist():
        drawn = live[torch.randperm(len(live), generator=generator)[:count].to(live.device)].sort().values
        value = code.latents[torch.searchsorted(code.vectors, vector)]
        parts.append((torch.full_like(drawn, vector), drawn, value.to(code.values.dtype).expand(len(drawn))))
    if not parts:
        return code
    vectors, latents, values = (torch.cat(column) for column in zip(*parts, strict=True))
    return ActiveLatents(vectors, latents, values, code.num_vectors, code.num_latents)


def _replaced(code: ActiveLatents, chosen: Int[Tensor, " S"], simulated: Float[Tensor, "N S"]) -> ActiveLatents:
    missing = simulated.isnan()
    if missing.any():
        simulated = torch.where(missing, columns_of(code, chosen).to(simulated.dtype), simulated)
    rows, columns = simulated.nonzero(as_tuple=True)
    kept = without(code, chosen)
    vectors = torch.cat([kept.vectors, rows])
    latents = torch.cat([kept.latents, chosen[columns]])
    values = torch.cat([kept.values, simulated[rows, columns].to(kept.values.dtype)])
    order = (vectors * code.num_latents + latents).argsort()
    return ActiveLatents(vectors[order], latents[order], values[order], code.num_vectors, code.num_latents)


def _spans(num_vectors: int, width: int) -> list[tuple[int, int]]:
    step = max(1, ENTRIES_AT_ONCE // width)
    return [(start, min(num_vectors, start + step)) for start in range(0, num_vectors, step)]


def _kept(code: ActiveLatents, stays: Bool[Tensor, " entries"]) -> ActiveLatents:
    return ActiveLatents(
        code.vectors[stays], code.latents[stays], code.values[stays], code.num_vectors, code.num_latents
    )
