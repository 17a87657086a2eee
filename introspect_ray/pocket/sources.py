"""The pocket world as source rows, in the very formats that real sources have."""

from __future__ import annotations

import json
import random
from typing import Any

from introspect_ray.errors import UserError
from introspect_ray.models.paths import POCKET_ARTIFACTS
from introspect_ray.pocket.activations import activation_rows
from introspect_ray.pocket.text import Corpus
from introspect_ray.pocket.world import RELATIONS, Fact, World

Row = dict[str, Any]

QUESTIONS_PER_FACT = 4
"""Questions about one fact, with other options and another hint each; they share their stem and so their split."""


WORLD_SEED = 0
"""Seed of the world that the shipped models know."""


def rows(task: str) -> list[Row]:
    """Rows of the shipped world for one task: CounterFact columns, MMLU columns, or latent labels."""
    makers = {"activation_patching": fact_rows, "input_ablation": question_rows, "feature_description": label_rows}
    if task not in makers:
        raise UserError(f"the pocket world has no rows for task {task!r}: expected one of {', '.join(makers)}")
    return makers[task](World(WORLD_SEED))


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
    """Columns of `cais/mmlu`: as many questions about never stated facts as about common ones."""
    rng = random.Random(f"{world.seed}/questions")
    corpus = Corpus(world, seed=-1)
    never = world.facts_of("never")
    facts: list[Fact] = [*never, *rng.sample(world.facts_of("common"), len(never)), *world.facts_of("rare")]
    rows = []
    for fact in facts:
        for _ in range(QUESTIONS_PER_FACT):
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
    """Labels of the shipped SAE's latents, and labelled activations, which bring their vector."""
    path = POCKET_ARTIFACTS / "sae" / "labels.jsonl"
    if not path.exists():
        raise UserError(f"no labels at {path}: build the pocket artifacts with `python jobs/build_pocket.py`")
    labels: list[Row] = [json.loads(line) for line in path.read_text().splitlines()]
    return [*labels, *activation_rows(path.parent)]


def text_rows(world: World, count: int, seed: int) -> list[Row]:
    """Plain text, one document per row, column `text`."""
    corpus = Corpus(world, seed)
    return [{"text": corpus.document().text} for _ in range(count)]
