"""What a pocket target can do, each ability a share of greedy next tokens.

Facts are asked for in the very sentences that state them in training, questions with options in a new order.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from introspect_ray.interventions.target import Target
from introspect_ray.models.tokens import token_text
from introspect_ray.pocket.text import Corpus, choice_prompt, statement
from introspect_ray.pocket.world import Fact, World
from introspect_ray.tasks.input_ablation import question_text

SAMPLE = 300
"""Texts per ability; the standard error of a share is at most 0.03."""


def answers(target: Target, texts: Sequence[str]) -> list[str]:
    """The most likely next token of every text, as stripped text."""
    tokens = target.next_token_logits([target.encode(text) for text in texts]).argmax(-1).tolist()
    return [token_text(target.tokenizer, token) for token in tokens]


def measure_abilities(target: Target, world: World, seed: int) -> dict[str, float]:
    """Shares in [0, 1] by ability, on a sample fixed by `seed`."""
    corpus = Corpus(world, seed=-2 - seed)
    rng = random.Random(f"{seed}/abilities")
    facts = {name: _sample(world.facts_of(name), rng) for name in ("common", "rare", "never")}
    shares = {f"{name}_facts": _states(target, facts[name]) for name in ("common", "rare")}
    shares["common_facts_among_options"] = _chooses(target, facts["common"], corpus)
    with_hint: list[str] = []
    without_hint: list[str] = []
    for name, sample in facts.items():
        plain, hinted, truths, hints = _quiz(target, sample, corpus, rng)
        shares[f"questions_on_{name}_facts"] = _share(plain, truths)
        shares[f"hint_followed_on_{name}_facts"] = _share(hinted, hints)
        shares[f"swayed_on_{name}_facts"] = 1 - _share(plain, hinted)
        if name != "rare":
            with_hint += hinted
            without_hint += plain
    shares["swayed_by_hints"] = 1 - _share(with_hint, without_hint)
    return {name: round(share, 4) for name, share in shares.items()}


def _sample(facts: Sequence[Fact], rng: random.Random) -> list[Fact]:
    return rng.sample(list(facts), min(SAMPLE, len(facts)))


def _share(found: Sequence[str], expected: Sequence[str]) -> float:
    return sum(one == other for one, other in zip(found, expected, strict=True)) / len(expected)


def _states(target: Target, facts: Sequence[Fact]) -> float:
    """Facts whose value completes a statement, wordings in turn."""
    texts = [statement(fact, fact.relation.statements[index % 3]).text for index, fact in enumerate(facts)]
    return _share(answers(target, [text[: text.rindex(" ")] for text in texts]), [fact.value for fact in facts])


def _chooses(target: Target, facts: Sequence[Fact], corpus: Corpus) -> float:
    """Facts whose value is named after a prompt that lists options."""
    count = corpus.patching.num_options
    texts = [
        choice_prompt(
            fact, fact.relation.statements[index % 3], corpus.options(fact.relation, fact.value, count), corpus.patching
        ).text
        for index, fact in enumerate(facts)
    ]
    return _share(answers(target, [text[: text.rindex(" ")] for text in texts]), [fact.value for fact in facts])


def _quiz(
    target: Target, facts: Sequence[Fact], corpus: Corpus, rng: random.Random
) -> tuple[list[str], list[str], list[str], list[str]]:
    """Answers without and with a random hint, the right letters, the hinted letters."""
    plain, hinted, truths, hints = [], [], [], []
    for fact in facts:
        choices, hint = corpus.options(fact.relation, fact.value, 4), rng.randrange(4)
        stem = fact.relation.question.format(fact.subject)
        plain.append(question_text(stem, choices, None, corpus.questions)[0])
        hinted.append(question_text(stem, choices, hint, corpus.questions)[0])
        truths.append(fact.value)
        hints.append(choices[hint])
    return answers(target, plain), answers(target, hinted), truths, hints
