"""The three tasks, and how records are split."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from introspect_ray.config.base import Config, Fraction

TaskName = Literal["feature_description", "activation_patching", "input_ablation"]


def _slots(*names: str) -> AfterValidator:
    """A layout must have each of these slots exactly once."""

    def check(layout: str) -> str:
        for name in names:
            if layout.count(name) != 1:
                raise ValueError(f"needs {name} exactly once, found {layout.count(name)} in {layout!r}")
        return layout

    return AfterValidator(check)


class SplitConfig(Config):
    """Shares of the groups (subjects, questions, latents) per split; a stable hash of the group key decides."""

    train: Fraction = 0.7
    validation: Fraction = 0.05
    test: Fraction = 0.25
    salt: str = "introspect_ray"
    """Another salt gives another, equally stable assignment."""

    @model_validator(mode="after")
    def _sums_to_one(self) -> Self:
        total = self.train + self.validation + self.test
        if abs(total - 1) > 1e-6:
            raise ValueError(f"train + validation + test must be 1, found {total:g}")
        return self


class FeatureDescriptionConfig(Config):
    """Task 1: which latents, and their descriptions."""

    sae: str = "pocket:sae"
    """SAE or transcoder whose decoder rows are the vectors: a folder of sae-lens or sparsify, `sae-lens:RELEASE:ID`, or
    `pocket:sae`."""
    minimum_score: Fraction = 0.7
    """Latents whose label scores lower are left out, counted as `label_score_too_low`; unscored labels stay."""
    question: Annotated[str, _slots("{vector}")] = "At layer {layer}, {vector} encodes what?"
    """Layout of the query; `{vector}` is where the vector stands, `{layer}` the number of its layer."""


POCKET_FEATURES = FeatureDescriptionConfig(question="The note says{vector}. Which word is it?")
"""A question that the pocket targets have heard about words: models of this size do not learn to copy from a few
hundred examples, and one that already reads a word off its embedding need only learn to read it off a vector."""


class ActivationPatchingConfig(Config):
    """Task 2: P1 section 2.3."""

    num_blocks: Annotated[int, Field(ge=1)] = 4
    """The target's layers are cut into so many equal blocks of consecutive layers."""
    num_options: Annotated[int, Field(ge=2, le=26)] = 6
    """Answer options named in the prompt, the two true ones included."""
    instruction: Annotated[str, _slots("{options}")] = "\nRespond with one of {options} and nothing else.\nAnswer:"
    """Follows the factual prompt; `{options}` becomes `X or Y or ...`."""
    pairs_per_subject: Annotated[int, Field(ge=1)] = 3
    """Counterfactual partners per prompt."""
    subjects_per_group: Annotated[int, Field(ge=2)] = 4
    """Validation and test subjects are paired only within groups of this size, so that groups are independent."""
    balance: bool = True
    """Select equally many changed and unchanged records per (block, kind of position) for training and evaluation."""
    majority_floor: Fraction = 0.03
    """Share of the larger class that a (block, kind) cell keeps where the smaller one has fewer records, so that no
    cell is lost because nothing ever changes there."""


class InputAblationConfig(Config):
    """Task 3: multiple-choice questions with a hint."""

    answer: Literal["letter", "text"] = "letter"
    """How the target answers: by an option's letter (P1), or by its text where that is a single token."""
    question: Annotated[str, _slots("{question}", "{options}", "{hint}")] = "{question}\n{options}{hint}\nAnswer:"
    """Layout of the prompt; `{options}` holds all options, `{hint}` is where the hint stands."""
    option: Annotated[str, _slots("{choice}")] = "{letter}. {choice}"
    """Layout of one option."""
    separator: str = "\n"
    """Between two options."""
    hint: Annotated[str, Field(min_length=1)] = "\nHint: {letter}"
    """Wording of the span that is ablated; `{letter}` and `{choice}` are the hinted option's."""
    policy: Literal["random", "wrong", "correct"] = "random"
    """Which option a hint names."""


POCKET_QUESTIONS = InputAblationConfig(
    answer="text",
    question="{question}\nChoose {options}.{hint}\nAnswer:",
    option="{choice}",
    separator=" or ",
    hint="\nHint: {choice}",
)
"""What the pocket targets were trained on: models of this size bind a word, not a letter, to an answer."""
