"""Requests that a page may offer for the pocket targets: texts, patches and ablations of held-out subjects.

All texts are the world's plain texts, or begin one, so that the lexicon can simulate on them.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, islice

from introspect_ray.config import POCKET_QUESTIONS, ModelConfig, SplitConfig
from introspect_ray.data.splits import split_of
from introspect_ray.models.loading import load_tokenizer
from introspect_ray.models.tokens import encode_with_offsets, position_of
from introspect_ray.pocket.sources import TEXT_SEED, TEXTS, WORLD_SEED, Row, fact_rows
from introspect_ray.pocket.text import Corpus, Document
from introspect_ray.pocket.world import World
from introspect_ray.serving.api import AblationExample, Examples, PatchExample
from introspect_ray.serving.hints import is_hint

COUNT = 8
LONGEST_TEXT = 90
"""Characters of a text that is offered."""
SEARCHED = TEXTS // 10
"""Plain texts that are looked at."""


def pocket_examples(model: ModelConfig) -> Examples:
    """Texts of the pocket world, and interventions on facts that the demo's explainers were not trained on."""
    world = World(WORLD_SEED)
    corpus = Corpus(world, TEXT_SEED)
    documents = [corpus.document() for _ in range(SEARCHED)]
    short = (one.text for one in documents if len(one.text) <= LONGEST_TEXT and one.kind in ("statement", "prose"))
    return Examples(
        texts=list(islice(short, COUNT)),
        patches=list(islice(_patches(documents, fact_rows(world), model), COUNT)),
        ablations=list(islice(_ablations(documents), COUNT)),
    )


def _patches(documents: list[Document], facts: list[Row], model: ModelConfig) -> Iterator[PatchExample]:
    """At the last token of a subject, the vector of a subject with another answer, in the first layer."""
    tokenizer = load_tokenizer(model)
    held_out = [row for row in facts if _is_held_out(row["subject"])]
    for document in documents:
        if document.kind != "choice":
            continue
        prompt, answer = _prompt_and_answer(document)
        subject = next(piece.text for piece in document.pieces if piece.role == "subject")
        options = {f" {piece.text}" for piece in document.pieces if piece.role == "option"} - {answer}
        relations = {
            row["relation_id"] for row in held_out if row["subject"] == subject and row["target_true"] == answer
        }
        others = (
            row["subject"] for row in held_out if row["relation_id"] in relations and row["target_true"] in options
        )
        if (other := next(others, None)) is None:
            continue
        start = prompt.index(subject)
        source = prompt[:start] + other + prompt[start + len(subject) :]
        positions = [
            position_of(encode_with_offsets(tokenizer, text)[1], start, start + len(name))
            for text, name in ((prompt, subject), (source, other))
        ]
        yield PatchExample(
            text=prompt, position=positions[0], source_text=source, source_position=positions[1], layers=[0, 0]
        )


def _ablations(documents: list[Document]) -> Iterator[AblationExample]:
    """A hint is left out."""
    for document in documents:
        ends = list(accumulate(len(piece.text) for piece in document.pieces))
        for piece, end in zip(document.pieces, ends, strict=True):
            if piece.role == "hint" and is_hint(piece.text, POCKET_QUESTIONS) and _is_held_out(document.pieces[0].text):
                prompt, _ = _prompt_and_answer(document)
                yield AblationExample(text=prompt, span=[end - len(piece.text), end])


def _prompt_and_answer(document: Document) -> tuple[str, str]:
    *prompt, answer = document.pieces
    return "".join(piece.text for piece in prompt), answer.text


def _is_held_out(group: str) -> bool:
    return split_of(group, SplitConfig()) == "test"
