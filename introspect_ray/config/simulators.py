"""Simulators: which one, how it is trained, and the jobs that train them and score descriptions with them."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from introspect_ray.config.base import Config, Fraction
from introspect_ray.config.resources import ActorConfig, ModelConfig
from introspect_ray.config.training import LoggingConfig, OptimizationConfig, TrainerConfig


class SimulatorConfig(Config):
    """A simulator: a folder of jobs/train_simulator.py, P1's published checkpoint, or any model with a prompt."""

    model: ModelConfig = ModelConfig(path="runs/simulator")
    kind: Literal["auto", "finetuned", "published", "prompted"] = "auto"
    """`auto`: finetuned for a folder with simulator.json, published for a name that ends in _simulator, else
    prompted."""
    cache_tokens: Annotated[int, Field(ge=0)] = 10_000_000
    """Simulated levels that are remembered, so that equal pairs are simulated once; 0 remembers none."""


class TrainSimulatorConfig(Config):
    """jobs/train_simulator.py: fine-tune a language model to say where a latent with a given description is active."""

    exemplars: str = "runs/exemplars"
    """Folder that collect_exemplars.py wrote; windows of its training texts are trained on."""
    descriptions: tuple[str, ...] = ("runs/descriptions",)
    """Files or folders of descriptions; every candidate of a latent is trained on."""
    output: str = "runs/simulator"
    model: ModelConfig = ModelConfig()
    """What training starts from."""
    firing_share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of the examples in which the latent fires. They count less in the loss, which in the end is that of the
    natural base rate whatever this is."""
    balanced_share: Fraction = 0.7
    """Share of the steps after `copy_first` over which weights go from equal ones to those of the natural base rate.
    Where almost every token is silent, what makes a latent fire is learnt late or never; the last steps learn how
    rarely it does."""
    copy_first: Annotated[float, Field(ge=0, lt=1)] = 0.4
    """Share of the steps that come first and have made-up examples only, described by words of their own window, on
    which they fire: for models that do not compare texts by themselves, such as small ones; 0 for those that do."""
    copy_share: Annotated[float, Field(ge=0)] = 0.25
    """Made-up examples per example in the steps after that. They fade out while weights become natural."""
    held_out_share: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the latents that are not trained on, by a hash of layer, number and `seed`, so that what is learnt of
    latents can be told from what is known of others. A text that describes one of them is not trained on for any."""
    label_score: str | None = None
    """Name of a score that descriptions have; those with less than `minimum_score`, or without it, are not trained on.
    None trains on all: what a wrong description teaches is that descriptions say little."""
    minimum_score: float = 0.5
    max_latents: Annotated[int, Field(ge=1)] | None = None
    """Train on at most so many latents, drawn by a hash; workers hold the windows of all of them in memory."""
    optimization: OptimizationConfig = OptimizationConfig(steps=2500, batch_size=16, warmup_share=0.05)
    trainer: TrainerConfig = TrainerConfig(packing=False)
    logging: LoggingConfig = LoggingConfig()
    seed: int = 0

    @model_validator(mode="after")
    def _plain_training(self) -> Self:
        plain = TrainerConfig(packing=False)
        for name in ("sharding", "activation_checkpointing", "packing", "compile"):
            if getattr(self.trainer, name) != getattr(plain, name):
                raise ValueError(f"trainer.{name} is not for simulators: expected {getattr(plain, name)}")
        if self.optimization.epochs is not None:
            raise ValueError("optimization.epochs is not for simulators: expected none, and steps")
        return self


class ScoreDescriptionsConfig(Config):
    """jobs/score_descriptions.py: simulate every candidate description on held-out windows, keep the best."""

    exemplars: str = "runs/exemplars"
    """Folder that collect_exemplars.py wrote, or collect_vectors.py, whose vectors then take the place of latents."""
    descriptions: tuple[str, ...] = ("runs/descriptions",)
    """Files or folders of descriptions; a latent may have several candidates, of several sources."""
    output: str = "runs/scores"
    simulator: SimulatorConfig = SimulatorConfig()
    held_out: Literal["validation", "test"] = "test"
    """Split of the texts that scores are of; calibrations and thresholds are fitted on the training split. Vectors are
    of test texts themselves: `validation`."""
    controls: tuple[Literal["shuffled", "empty"], ...] = ("shuffled", "empty")
    """What is scored beside the descriptions: another latent's, and none."""
    best_by: Literal["correlation", "paper_compat", "f1"] = "correlation"
    """Score that the best candidate of a latent is chosen by."""
    first_stage: Literal["none", "tokens"] = "none"
    """`tokens`: windows without a token on which the latent was seen to fire are not simulated and count zero. Faster,
    and no longer a score of the words alone; its recall and what it skips are reported beside the scores."""
    first_stage_share: Fraction = 0.1
    """A latent counts as firing, for the first stage, above this share of its largest training activation."""
    max_latents: Annotated[int, Field(ge=1)] | None = None
    """Score at most so many latents, drawn by a hash."""
    only: Literal["all", "held_out", "trained"] = "all"
    """Latents that a simulator of train_simulator.py was trained without, or with."""
    split_of: str | None = None
    """Folder of the simulator whose training `only` is about; none: the one that scores. Names the fine-tuned one where
    a prompted one is to be scored on the same latents."""
    latents_per_shard: Annotated[int, Field(ge=1)] = 64
    bootstrap_samples: Annotated[int, Field(ge=100)] = 2000
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    max_failed_share: Fraction = 0.2
    """The run fails if the simulator failed on a larger share of the descriptions, controls among them."""
    actors: ActorConfig = ActorConfig()
    seed: int = 0

    @model_validator(mode="after")
    def _split_is_used(self) -> Self:
        if self.split_of is not None and self.only == "all":
            raise ValueError("split_of says which latents `only` is about: expected held_out or trained, found all")
        return self
