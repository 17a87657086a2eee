"""Who describes latents: a chat model that sees exemplars, a trained explainer that gets the decoder row, the lexicon.

Each takes shards of latents, rows of which may hold answers of earlier runs, and gives them back with the answers that
were left, shard after shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from introspect_ray.config import DescribeConfig
from introspect_ray.data.chat_pool import chat_model
from introspect_ray.data.cluster import connect
from introspect_ray.data.latent_rows import Candidate, FailedAnswer, LatentRow, failed_answer
from introspect_ray.data.pool import check_resources
from introspect_ray.data.vector_files import open_vectors
from introspect_ray.explainer.query import Query, Vector
from introspect_ray.features.describing import description_question, parse_description
from introspect_ray.features.descriptions import Description
from introspect_ray.features.exemplars import LatentExemplars
from introspect_ray.features.sae import load_sae
from introspect_ray.models.chat import ChatModel, Completion, Conversation, Failure
from introspect_ray.models.journal import Journal
from introspect_ray.training.answering import AnswerPool

Describe = Callable[[Sequence[Sequence[LatentRow]]], Iterator[list[LatentRow]]]
NO_WINDOW = "fires_in_no_window"
NO_LABEL = "not_in_the_lexicon"
SHARDS_PER_ACTOR = 2
"""Shards that wait or are under way, for every actor of an explainer."""


# --- a chat model -----------------------------------------------------------------------------------------------


@contextmanager
def chat_describer(
    config: DescribeConfig, read: Callable[[int], LatentExemplars], journal: Journal
) -> Iterator[Describe]:
    """Asks the chat model of the config about the exemplars that `read` gives."""
    with chat_model(config.chat, config.actors, config.seed, journal) as model:
        yield lambda shards: (describe_by_chat(config, model, read, rows) for rows in shards)


def describe_by_chat(
    config: DescribeConfig, model: ChatModel, read: Callable[[int], LatentExemplars], rows: Sequence[LatentRow]
) -> list[LatentRow]:
    """Every sample of every latent that has no answer yet; equal descriptions of a latent are one candidate."""
    questions = {row.latent: description_question(read(row.latent), config.prompt) for row in rows}
    answers: dict[int, dict[int, Completion | Failure]] = {row.latent: {} for row in rows}
    for sample in range(config.num_candidates):
        asked: list[tuple[int, Conversation]] = [
            (row.latent, question)
            for row in rows
            if (question := questions[row.latent]) is not None and _is_open(row, sample)
        ]
        found = model.complete([question for _, question in asked], sample) if asked else []
        for (latent, _), answer in zip(asked, found, strict=True):
            answers[latent][sample] = answer
    return [
        _with_answers(row, answers[row.latent])
        if questions[row.latent] is not None
        else row.model_copy(update={"failures": (FailedAnswer(sample=0, reason=NO_WINDOW),)})
        for row in rows
    ]


def _is_open(row: LatentRow, sample: int) -> bool:
    """Whether a sample has to be asked: all of a new latent, only the failed ones of another."""
    return not (row.candidates or row.failures) or any(one.sample == sample for one in row.failures)


def _with_answers(row: LatentRow, answers: Mapping[int, Completion | Failure]) -> LatentRow:
    """The row with further answers by sample, the same whenever each of them came."""
    texts = {one.sample: one.text for one in row.candidates}
    failures = [one for one in row.failures if one.sample not in answers]
    for sample, answer in answers.items():
        said = parse_description(answer) if isinstance(answer, Completion) else answer
        if isinstance(said, Failure):
            failures.append(failed_answer(sample, said))
        else:
            texts[sample] = said
    candidates: dict[str, Candidate] = {}
    for sample, text in sorted(texts.items()):
        candidates.setdefault(text, Candidate(text=text, sample=sample))
    return LatentRow(
        layer=row.layer,
        latent=row.latent,
        candidates=tuple(candidates.values()),
        failures=tuple(sorted(failures, key=lambda one: one.sample)),
    )


# --- an explainer -----------------------------------------------------------------------------------------------


@contextmanager
def explainer_describer(config: DescribeConfig) -> Iterator[Describe]:
    """Asks the trained explainer about decoder rows, or about the config's vectors, on Ray actors."""
    if config.vectors is None:
        known = load_sae(config.features.sae).feature_vectors.float().numpy()
    else:
        known = np.stack([one.vector for one in open_vectors(config.vectors).vectors])

    def query(row: LatentRow) -> Query:
        before, after = config.features.question.replace("{layer}", str(row.layer)).split("{vector}")
        return Query((before, Vector(known[row.latent], (row.layer,)), after))

    with connect():
        check_resources(config.actors)
        pool = AnswerPool(config.explainer, config.actors, config.batch_size, lambda _count: None)

        def describe(shards: Sequence[Sequence[LatentRow]]) -> Iterator[list[LatentRow]]:
            # A shard may be no more than one batch: as many are asked about at once as keep all actors at work.
            together = SHARDS_PER_ACTOR * config.actors.max_size
            for start in range(0, len(shards), together):
                group = shards[start : start + together]
                answers = pool.answer_groups("trained", [list(map(query, rows)) for rows in group])
                for rows, texts in zip(group, answers, strict=True):
                    found = [Completion(text, 0, 0) for text in texts]
                    yield [_with_answers(row, {0: answer}) for row, answer in zip(rows, found, strict=True)]

        yield describe


# --- the lexicon ------------------------------------------------------------------------------------------------


@contextmanager
def lexicon_describer(labels: Mapping[tuple[int, int], Sequence[Description]]) -> Iterator[Describe]:
    """Looks latents up in the labels that ship with a coder."""

    def labelled(row: LatentRow) -> LatentRow:
        known = labels.get((row.layer, row.latent), ())
        candidates = tuple(Candidate(text=one.text, scores=dict(one.scores)) for one in known)
        missing = () if candidates else (FailedAnswer(sample=0, reason=NO_LABEL),)
        return row.model_copy(update={"candidates": candidates, "failures": missing})

    yield lambda shards: (list(map(labelled, rows)) for rows in shards)
