"""Exemplars of the pocket SAE by brute force: every activation of some texts, and windows picked per latent from it."""

from functools import lru_cache

import numpy as np
import torch

from introspect_ray.config import ModelConfig
from introspect_ray.features.activations import residual_outputs
from introspect_ray.features.exemplars import Exemplar, LatentExemplars
from introspect_ray.features.sae import load_sae
from introspect_ray.features.windows import window
from introspect_ray.interventions.target import Target
from introspect_ray.pocket.sources import WORLD_SEED
from introspect_ray.pocket.sparse import sample_texts
from introspect_ray.pocket.world import World


@lru_cache(maxsize=1)
def target() -> Target:
    return Target.load(ModelConfig(device="cpu"))


def pocket_exemplars(
    documents: int, seed: int, latents: list[int], top: int = 20, sample: int = 20, random: int = 40, length: int = 32
) -> list[LatentExemplars]:
    """Windows of at most `length` tokens without begin-of-text; `sample` of the firing ones, drawn evenly."""
    texts = sample_texts(World(WORLD_SEED), target().tokenizer, documents, seed)
    sae = load_sae("pocket:sae")
    with torch.no_grad():
        active = sae.encode_sparse(residual_outputs(target().model, texts.ids, sae.layer))
    chosen = torch.isin(active.latents, torch.tensor(latents))
    tokens, which, values = (part[chosen].numpy() for part in (active.vectors, active.latents, active.values))
    spans, windows, start = [], [], 0
    for ids in texts.ids:
        for at in range(1, len(ids), length):
            windows.append(window(ids[at : at + length], target().tokenizer))
            spans.append((start + at - 1, start + at - 1 + len(windows[-1])))
        start += len(ids) - 1
    starts = np.array([first for first, _ in spans])
    rng = np.random.default_rng(seed)
    drawn = rng.choice(len(windows), random, replace=False)
    found = []
    for latent in latents:
        mine = which == latent
        at, strength = tokens[mine], values[mine].astype(np.float64)
        owner = np.searchsorted(starts, at, side="right") - 1
        rows: dict[int, np.ndarray] = {}
        for position, value, number in zip(at, strength, owner, strict=True):
            row = rows.setdefault(int(number), np.zeros(len(windows[number])))
            row[position - starts[number]] = value
        ranked = sorted(rows, key=lambda number: -rows[number].max())
        fair = rng.permutation(sorted(rows))[:sample]
        fair = sorted(fair, key=lambda number: rows[number].max())
        silent = {number: np.zeros(len(windows[number])) for number in drawn}
        picked = [Exemplar(windows[number], rows[number], "top") for number in ranked[:top]]
        picked += [
            Exemplar(windows[number], rows[number], "quantile", 4 * place // len(fair))
            for place, number in enumerate(fair)
        ]
        picked += [Exemplar(windows[number], rows.get(int(number), silent[number]), "random") for number in drawn]
        density, maximum = len(at) / active.num_vectors, float(strength.max(initial=0.0))
        found.append(LatentExemplars(sae.layer, latent, density, maximum, tuple(picked)))
    return found
