"""Yes/no judgements of text windows by a description, and what they say about it (detection, fuzzing)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from introspect_ray.features.descriptions import Score


@dataclass(frozen=True)
class Judgement:
    """One window, whether it is one of the latent's, and what the model said about it."""

    tokens: tuple[str, ...]
    activations: tuple[float, ...]
    distance: int | float
    """Number of the range of the latent's activations that the window is from, counted from 1; 0 for its top, -1 where
    it is silent (delphi: `distance`)."""
    activating: bool
    """Whether the right answer is yes."""
    prediction: bool | None
    """The answer; none where there is none that can be used."""
    probability: float | None = None
    """P(yes), where the model's own probabilities are known."""
    reason: str | None = None
    """Why there is no answer."""

    @property
    def correct(self) -> bool | None:
        return None if self.prediction is None else self.prediction == self.activating


def classification_scores(judgements: Sequence[Judgement]) -> dict[str, Score]:
    """Balanced accuracy, F1, precision, recall and AUC of the answers; the share without an answer, and how many.

    With TP, FP, TN, FN over judgements with an answer: recall TP / (TP + FN), precision TP / (TP + FP), F1 = 2 TP /
    (2 TP + FP + FN), balanced accuracy the mean of recall and TN / (TN + FP). A denominator of 0 gives no value but a
    reason, where delphi gives 0; so do precision and F1 without silent windows, where nothing can be a false alarm.
    `auc` is of P(yes).
    """
    answered = [one for one in judgements if one.prediction is not None]
    positives = [one for one in answered if one.activating]
    negatives = [one for one in answered if not one.activating]
    hits, false_alarms = (sum(bool(one.prediction) for one in group) for group in (positives, negatives))
    recall = _ratio(hits, len(positives), "no_answer_about_active_windows")
    specificity = _ratio(len(negatives) - false_alarms, len(negatives), "no_answer_about_silent_windows")
    missing = next((part.reason for part in (recall, specificity) if part.reason), None)
    both = None if missing else ((recall.value or 0.0) + (specificity.value or 0.0)) / 2
    f1 = _ratio(2 * hits, hits + false_alarms + len(positives), "no_answer_about_active_windows")
    precision = _ratio(hits, hits + false_alarms, "nothing_judged_active")
    return {
        "balanced_accuracy": Score(both, missing),
        "f1": f1 if negatives or f1.reason else Score(None, specificity.reason),
        "precision": precision if negatives or precision.reason else Score(None, specificity.reason),
        "recall": recall,
        "auc": auc([one for one in answered if one.probability is not None]),
        "failure_rate": _ratio(len(judgements) - len(answered), len(judgements), "no_windows"),
    }


def auc(judgements: Sequence[Judgement]) -> Score:
    """Chance that a window of the latent gets a larger P(yes) than another, equal ones counting half."""
    yes = np.array([one.probability for one in judgements if one.activating], dtype=np.float64)
    no = np.sort(np.array([one.probability for one in judgements if not one.activating], dtype=np.float64))
    if not len(yes) or not len(no):
        return Score(None, "no_probabilities_of_both_kinds")
    below, up_to = np.searchsorted(no, yes, "left"), np.searchsorted(no, yes, "right")
    return Score(float((below + up_to).sum() / (2 * len(yes) * len(no))))


def _ratio(part: int, whole: int, reason: str) -> Score:
    return Score(part / whole) if whole else Score(None, reason)
