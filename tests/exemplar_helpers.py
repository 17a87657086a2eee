"""Exemplars written as words, and a chat model that answers by a function."""

import numpy as np

from introspect_ray.features.exemplars import Exemplar, LatentExemplars
from introspect_ray.features.windows import Window
from introspect_ray.models.chat import Choice, Completion, Failure, parse_choice


def exemplar(pieces, activations, kind="top", quantile=None):
    values = np.zeros(len(pieces), dtype=np.float32)
    for place, value in activations.items():
        values[place] = value
    return Exemplar(Window(tuple(range(len(pieces))), tuple(pieces)), values, kind, quantile)


def latent(*exemplars, layer=1, number=7, maximum=10.0):
    return LatentExemplars(layer, number, 0.1, maximum, tuple(exemplars))


class ScriptedChat:
    """`answer(text of the last message)` is a text, a Failure, or for choices a tuple of probabilities."""

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def complete(self, conversations, sample=0):
        return [self._one(conversation, sample) for conversation in conversations]

    def choose(self, conversations, choices):
        found = []
        for conversation in conversations:
            said = self._one(conversation, 0)
            if isinstance(said, tuple):
                said = Choice(max(range(len(said)), key=said.__getitem__), said)
            found.append(parse_choice(said, choices) if isinstance(said, Completion) else said)
        return found

    def _one(self, conversation, sample):
        self.asked.append(conversation[-1].content)
        said = self.answer(conversation[-1].content)
        said = said[sample % len(said)] if isinstance(said, list) else said
        return Completion(said, 1, 1) if isinstance(said, str) else said


__all__ = ["Failure", "ScriptedChat", "exemplar", "latent"]
