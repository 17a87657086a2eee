"""The pocket world as source rows, in the very formats that real sources have."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

from introspect_ray.errors import UserError
from introspect_ray.models.paths import POCKET_ARTIFACTS
from introspect_ray.pocket.text import Corpus
from introspect_ray.pocket.world import RELATIONS, Familiarity, World

Row = dict[str, Any]

QUESTIONS_PER_FACT: Mapping[Familiarity, int] = {"common": 4, "rare": 4, "never": 10}
"""Questions about one fact, with other options and another hint each; they share their stem and so their split.

Never stated facts are fewer, and hints matter most there: together about as many questions as about common ones."""
WORLD_SEED = 0
"""Seed of the world that the shipped models know."""
TEXT_SEED, TEXTS = 1004, 10_000
"""Seed and number of the plain texts; no stage of the build uses this seed."""


def rows(purpose: str) -> list[Row]:
    """Rows of the shipped world for a task (CounterFact columns, MMLU columns, latent labels), or as plain "text"."""
    makers = {
        "activation_patching": fact_rows,
        "input_ablation": question_rows,
        "feature_description": label_rows,
        "text": text_rows,
    }
    if purpose not in makers:
        raise UserError(f"the pocket world has no rows for {purpose!r}: expected one of {', '.join(makers)}")
    return makers[purpose](World(WORLD_SEED))


def fact_rows(world: World) -> list[Row]:
    """Columns of `counterfact-tracing`; one row per stated fact, one wording per relation."""
    rng = random.Random(f"{world.seed}/false targets")
    wordings = {relation.name: relation.statements[index % 3] for index, relation in enumerate(RELATIONS)}
    rows = []
    for fact in world.facts:
        if fact.familiarity == "never":
            continue
        before, after = wordings[fact.relation.name].split("{}")
        false = rng.choice([value for value in fact.relation.values if value != fact.value])
        rows.append(
            {
                "relation": wordings[fact.relation.name],
                "relation_prefix": before,
                "relation_suffix": after,
                "prompt": f"{before}{fact.subject}{after}",
                "relation_id": fact.relation.name,
                "target_true": f" {fact.value}",
                "target_true_id": value_id(fact.relation.name, fact.value),
                "target_false": f" {false}",
                "target_false_id": value_id(fact.relation.name, false),
                "subject": fact.subject,
            }
        )
    return rows


def value_id(relation: str, value: str) -> str:
    return f"{relation}/{value}"


def question_rows(world: World) -> list[Row]:
    """Columns of `cais/mmlu`: questions about every fact of the world."""
    rng = random.Random(f"{world.seed}/questions")
    corpus = Corpus(world, seed=-1)
    rows = []
    for fact in world.facts:
        for _ in range(QUESTIONS_PER_FACT[fact.familiarity]):
            choices = corpus.options(fact.relation, fact.value, 4)
            rows.append(
                {
                    "question": fact.relation.question.format(fact.subject),
                    "subject": fact.relation.value_class,
                    "choices": choices,
                    "answer": choices.index(fact.value),
                }
            )
    rng.shuffle(rows)
    return rows


def label_rows(world: World) -> list[Row]:  # noqa: ARG001 - the shipped SAE belongs to the shipped world
    """Labels of the shipped SAE's latents."""
    path = POCKET_ARTIFACTS / "sae" / "labels.jsonl"
    if not path.exists():
        raise UserError(f"no labels at {path}: build the pocket artifacts with `python jobs/build_pocket.py`")
    labels: list[Row] = [json.loads(line) for line in path.read_text().splitlines()]
    return labels


def text_rows(world: World) -> list[Row]:
    """Plain text, one document per row, column `text`."""
    corpus = Corpus(world, TEXT_SEED)
    return [{"text": corpus.document().text} for _ in range(TEXTS)]
