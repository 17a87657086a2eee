"""Residual activations of the pocket target with the word that each stands at: more vectors to learn descriptions from.

An explainer that sees only the few hundred labelled latents learns them by heart. Full activations of other words teach
it to read a word off a vector (P1 uses such vectors for evaluation out of distribution; here they only train).
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from introspect_ray.features.activations import residual_outputs
from introspect_ray.interventions.target import Target
from introspect_ray.pocket.lexicon import word_description
from introspect_ray.pocket.sparse import sample_texts
from introspect_ray.pocket.world import World

VECTORS_FILE, ROWS_FILE = "activations.safetensors", "activations.jsonl"
SEED = 1004
"""Seed of the corpus that the activations come from; no other stage uses it."""


def write_activations(folder: Path, target: Target, world: World, layer: int, documents: int, per_word: int) -> None:
    """Residual outputs of `layer` at up to `per_word` tokens of every word in a sample of `documents`."""
    texts = sample_texts(world, target.tokenizer, documents, SEED)
    taken: Counter[str] = Counter()
    rows, descriptions = [], []
    for row, word in enumerate(texts.words):
        if word is not None and taken[word.text] < per_word:
            taken[word.text] += 1
            rows.append(row)
            descriptions.append(word_description(word.text))
    vectors = residual_outputs(target.model, texts.ids, layer)[torch.tensor(rows)]
    save_file({"vectors": vectors.to(torch.float16).contiguous()}, folder / VECTORS_FILE)
    lines = (json.dumps({"layer": layer, "description": description}) + "\n" for description in descriptions)
    (folder / ROWS_FILE).write_text("".join(lines), encoding="utf-8")


def activation_rows(folder: Path) -> list[dict[str, Any]]:
    """The same as latent-label rows that bring their own vector; `index` counts them."""
    vectors = load_file(folder / VECTORS_FILE)["vectors"].tolist()
    lines = (folder / ROWS_FILE).read_text(encoding="utf-8").splitlines()
    return [
        {**row, "index": index, "kind": "activation", "accepted": [row["description"]], "score": 1.0, "vector": vector}
        for index, (row, vector) in enumerate(zip(map(json.loads, lines), vectors, strict=True))
    ]
