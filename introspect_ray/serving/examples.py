"""Requests that a page may offer for the pocket targets: texts, patches and ablations of held-out subjects."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from introspect_ray.config import POCKET_QUESTIONS, ActivationPatchingConfig, ModelConfig, SplitConfig
from introspect_ray.data.splits import split_of
from introspect_ray.models.loading import load_tokenizer
from introspect_ray.models.tokens import encode_with_offsets, position_of
from introspect_ray.pocket.sources import TEXT_SEED, WORLD_SEED, Row, fact_rows, question_rows
from introspect_ray.pocket.text import Corpus
from introspect_ray.pocket.world import World
from introspect_ray.serving.api import AblationExample, Examples, PatchExample
from introspect_ray.tasks.activation_patching import options_text
from introspect_ray.tasks.input_ablation import question_text

COUNT = 8
LONGEST_TEXT = 90
"""Characters of a text that is offered."""
NUM_OPTIONS = 4


def pocket_examples(model: ModelConfig) -> Examples:
    """Texts of the pocket world, and interventions on facts that the demo's explainers were not trained on."""
    world = World(WORLD_SEED)
    corpus = Corpus(world, TEXT_SEED)
    texts = (document.text for document in iter(corpus.document, None))
    return Examples(
        texts=list(islice((text for text in texts if len(text) <= LONGEST_TEXT and "\n" not in text), COUNT)),
        patches=list(islice(_patches(world, model), COUNT)),
        ablations=list(islice(_ablations(world), COUNT)),
    )


def _patches(world: World, model: ModelConfig) -> Iterator[PatchExample]:
    """At the last token of a subject, the vector of another subject's, in the first layer."""
    tokenizer = load_tokenizer(model)
    by_relation: dict[str, list[Row]] = {}
    for row in fact_rows(world):
        if _is_held_out(row["subject"]):
            by_relation.setdefault(row["relation_id"], []).append(row)
    for rows in by_relation.values():
        one, other = rows[0], next((row for row in rows if row["target_true"] != rows[0]["target_true"]), None)
        if other is None:
            continue
        answers = sorted({row["target_true"].strip() for row in rows})
        wanted = [row["target_true"].strip() for row in (one, other)]
        options = sorted([*wanted, *[answer for answer in answers if answer not in wanted][: NUM_OPTIONS - 2]])
        places = []
        for row in (one, other):
            text = row["prompt"] + ActivationPatchingConfig().instruction.replace("{options}", options_text(options))
            start = len(row["relation_prefix"])
            _, offsets = encode_with_offsets(tokenizer, text)
            places.append((text, position_of(offsets, start, start + len(row["subject"]))))
        (text, position), (source_text, source_position) = places
        yield PatchExample(
            text=text, position=position, source_text=source_text, source_position=source_position, layers=[0, 0]
        )


def _ablations(world: World) -> Iterator[AblationExample]:
    """A hint at a wrong answer is left out."""
    for row in question_rows(world):
        if _is_held_out(row["question"]):
            hinted = (row["answer"] + 1) % len(row["choices"])
            text, span = question_text(row["question"], row["choices"], hinted, POCKET_QUESTIONS)
            assert span is not None
            yield AblationExample(text=text, span=list(span))


def _is_held_out(group: str) -> bool:
    return split_of(group, SplitConfig()) == "test"
