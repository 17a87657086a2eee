"""The job that rewrites a target with simulated latents."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from introspect_ray.config.base import Config, Fraction
from introspect_ray.config.resources import ActorConfig, ModelConfig, SourceConfig
from introspect_ray.config.simulators import SimulatorConfig, TrainSimulatorConfig
from introspect_ray.config.tasks import POCKET_FEATURES, SplitConfig
from introspect_ray.config.training import TrainerConfig

Name = Annotated[str, Field(pattern=r"^\w[\w .,:+()-]{0,39}$")]
Selection = Literal["score", "contribution", "random"]
P2_FRACTIONS = (0.001, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)


class DescriptionSourceConfig(Config):
    """Where descriptions come from."""

    name: Name = "lexicon"
    kind: Literal["lexicon", "file", "explainer", "none"] = "lexicon"
    """`lexicon`: labels.jsonl beside the coder; `file`: descriptions.jsonl, or a folder with it, such as
    describe_latents.py and convert_descriptions.py write; `explainer`: a trained explainer is asked about each decoder
    row; `none`: the empty description, for every latent the same."""
    path: str = ""
    """File or explainer folder (any fsspec URL)."""

    @model_validator(mode="after")
    def _has_path(self) -> Self:
        if (self.kind in ("file", "explainer")) != bool(self.path):
            raise ValueError(f"description source {self.name} of kind {self.kind} has path {self.path!r}")
        return self


class RewriteSimulatorConfig(Config):
    """One simulator: a given one, or one that this job trains or builds."""

    name: Name = "finetuned"
    kind: Literal["given", "pocket", "exact"] = "pocket"
    """`pocket`: trained by this job on pocket texts that are not evaluated on, into `simulators/NAME` of the output;
    `exact`: the pocket lexicon itself, which says 10 where a description holds and 0 elsewhere."""
    given: SimulatorConfig | None = None
    training: TrainSimulatorConfig = TrainSimulatorConfig(
        held_out_share=0,
        label_score="label_f1",
        trainer=TrainerConfig(packing=False, cpus_per_worker=2, checkpoint_every=250),
    )
    """`pocket`: how it is trained; its exemplars, descriptions, starting model and output are this run's own. With
    `held_out_share` 0 it knows all descriptions, from other texts; `balanced_share` 1 never reaches the natural base
    rate."""

    @model_validator(mode="after")
    def _is_given(self) -> Self:
        if (self.kind == "given") != (self.given is not None):
            raise ValueError(f"simulator {self.name} of kind {self.kind} has given: {self.given}")
        return self


class RewriteLineConfig(Config):
    """One line of the plot: latents chosen in one way, replaced in one way, at every fraction up to `max_fraction`."""

    name: Name
    kind: Literal["simulated", "deleted", "oracle", "oracle_levels"] = "simulated"
    """`deleted`: the chosen latents are zero; `oracle`: they keep their true values; `oracle_levels`: the true values
    rounded to the levels 0..10 of a simulator, the ceiling of that format."""
    source: str = "lexicon"
    simulator: str = "finetuned"
    selection: Selection = "score"
    """Latents with the best description first, those that the loss needs most first, or in random order."""
    descriptions: Literal["one", "max", "mean", "contrast", "shuffled"] = "one"
    """`max` and `mean` combine the levels of all descriptions of a latent; `contrast` subtracts the levels of another
    latent's description ("this, but not that"), chosen on text that is not evaluated on; `shuffled` gives every
    latent the description of another one."""
    scale: Literal["raw", "linear", "fitted", "quantile", "shrunk", "detected", "context"] = "quantile"
    """From level to activation: one unit for all; linear up to each latent's maximum (P2); linear with the slope of
    least squared error; quantile-normalised; that, times how far the latent's values can be trusted; first whether it
    fires, then how strongly; that, with a threshold that depends on the context."""
    repaired: Literal["nothing", "false_alarms", "misses", "both"] = "nothing"
    """What an oracle corrects, to tell what is wrong: activations where there are none, missing ones, or both, which
    leaves wrong strengths alone."""
    max_fraction: Fraction = 1.0


def _lines() -> tuple[RewriteLineConfig, ...]:
    """Lines for the pocket world. Names say which latents come first where it is not the best described ones:
    `needed:` those that the loss needs most, which shows what simulation loses, `random:` any."""
    line = RewriteLineConfig
    options: tuple[tuple[str, dict[str, Any]], ...] = (
        ("linear", {"scale": "linear"}),
        ("fitted", {"scale": "fitted"}),
        ("shrunk", {"scale": "shrunk"}),
        ("detected", {"scale": "detected"}),
        ("context", {"scale": "context"}),
        ("contrast", {"descriptions": "contrast"}),
        ("max of several", {"descriptions": "max"}),
        ("mean of several", {"descriptions": "mean"}),
        ("shuffled", {"descriptions": "shuffled"}),
        ("no false alarms", {"repaired": "false_alarms"}),
        ("no misses", {"repaired": "misses"}),
        ("neither", {"repaired": "both"}),
    )
    needed = (
        line(name="needed: deleted", kind="deleted"),
        line(name="needed: oracle", kind="oracle", max_fraction=0.2),
        line(name="needed: oracle levels", kind="oracle_levels", max_fraction=0.4),
        line(name="needed: quantile", max_fraction=0.2),
        line(name="needed: raw", scale="raw", max_fraction=0.2),
        line(name="needed: no description", source="none", max_fraction=0.2),
        *(line(name=f"needed: {name}", max_fraction=0.2, **changes) for name, changes in options),
        line(name="needed: exact reader", simulator="exact"),
        *(line(name=f"needed: exact, {name}", simulator="exact", max_fraction=0.2, **how) for name, how in options),
    )
    score = (
        line(name="deleted", kind="deleted"),
        line(name="oracle levels", kind="oracle_levels", max_fraction=0.4),
        line(name="exact reader", simulator="exact"),
        line(name="exact, linear", simulator="exact", scale="linear", max_fraction=0.4),
        line(name="exact, shuffled", simulator="exact", descriptions="shuffled", max_fraction=0.4),
        line(name="random: deleted", kind="deleted", selection="random"),
        line(name="random: exact reader", simulator="exact", selection="random"),
    )
    return (*(one.model_copy(update={"selection": "contribution"}) for one in needed), *score)


POCKET_LINES = _lines()


class RewriteConfig(Config):
    """jobs/rewrite_transformer.py: a target with some latents replaced by what a simulator predicts from words."""

    output: str = "runs/rewrite"
    """Folder for scores.json, report.html and everything that a stopped run goes on from (any fsspec URL)."""
    target: ModelConfig = ModelConfig()
    coder: str = "pocket:transcoder"
    """A transcoder replaces the MLP of its layer, an SAE the residual stream that its layer puts out."""
    source: SourceConfig = SourceConfig()
    """Plain texts."""
    split: SplitConfig = SplitConfig(train=0.6, validation=0.1, test=0.3)
    """Shares of the texts, as in collect_exemplars.py, so that simulators have seen none that is evaluated on."""
    evaluation_texts: Annotated[int, Field(ge=2)] = 160
    """Texts of the test split that losses are of."""
    fit_texts: Annotated[int, Field(ge=1)] = 120
    """Texts of the validation split that are simulated to fit scales on."""
    statistics_texts: Annotated[int, Field(ge=1)] = 2000
    """Texts of the training split that, with the fit texts, maxima, firing rates, contributions and mean outputs come
    from."""
    where: Literal["all", "last"] = "all"
    """Positions that are replaced and measured: all but the first of a text, or the last of a window."""
    window_tokens: Annotated[int, Field(ge=2)] = 64
    """Tokens of a text, or of a window, at most."""
    top_k: Annotated[int, Field(ge=1)] | None = None
    """Of the edited code only the k largest latents stay (P2: 32); none keeps all."""
    minimum_firings: Annotated[int, Field(ge=1)] = 10
    """Latents that fire on fewer tokens of the statistics texts are not live: they keep their true values."""
    sources: tuple[DescriptionSourceConfig, ...] = (
        DescriptionSourceConfig(),
        DescriptionSourceConfig(name="none", kind="none"),
    )
    """The first source's scores decide which descriptions are best, for all lines alike."""
    score: str | None = None
    """Name of the score that `selection: score` goes by; none takes the first that a description has."""
    explainer: str | None = None
    """Folder of a trained explainer: adds its descriptions as the source `explainer`, and of every simulator the line
    `needed: explainer, SIMULATOR`."""
    question: str = POCKET_FEATURES.question
    """What explainers are asked, with `{vector}` in it: the question that they were trained on."""
    simulator: str | None = None
    """Folder of a trained simulator, to take in place of the first one of `simulators`."""
    simulators: tuple[RewriteSimulatorConfig, ...] = (
        RewriteSimulatorConfig(),
        RewriteSimulatorConfig(name="exact", kind="exact"),
    )
    lines: tuple[RewriteLineConfig, ...] = POCKET_LINES
    fractions: tuple[Annotated[float, Field(gt=0, le=1)], ...] = P2_FRACTIONS
    """Shares of the live latents that are replaced."""
    headline: str = "needed: quantile"
    """Line that the report is about, at `headline_fraction`."""
    headline_fraction: Annotated[float, Field(gt=0, le=1)] = 0.2
    paper_compat: bool = False
    """P2 as coded, whatever `where`, `window_tokens`, `top_k`, `fractions` and `lines` say: the last token of 32-token
    windows, top 32 kept, best-scored and random latents, its linear scale and its random latents with their defects."""
    max_failed_share: Fraction = 0.05
    """The run fails if the simulator raised for a larger share of its (description, text shard) pairs."""
    texts_per_shard: Annotated[int, Field(ge=1)] = 80
    descriptions_per_block: Annotated[int, Field(ge=1)] = 128
    cache: str | None = None
    """Folder for simulated levels, which runs may share (any fsspec URL); none: `levels` in the output."""
    target_actors: ActorConfig = ActorConfig(initial_size=2, max_size=2)
    simulator_actors: ActorConfig = ActorConfig(initial_size=2, max_size=2)
    bootstrap_samples: Annotated[int, Field(ge=100)] = 2000
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    seed: int = 0

    @model_validator(mode="after")
    def _names_agree(self) -> Self:
        for kind, items in (("sources", self.sources), ("simulators", self.simulators), ("lines", self.lines)):
            names = [item.name for item in items]
            if not names or len(set(names)) < len(names):
                raise ValueError(f"{kind} are {', '.join(names) or 'empty'}: expected at least one, each name once")
        sources = {source.name for source in self.sources} | ({"explainer"} if self.explainer else set())
        simulators = {simulator.name for simulator in self.simulators}
        for line in self.lines:
            if line.kind == "simulated" and (line.source not in sources or line.simulator not in simulators):
                raise ValueError(
                    f"line {line.name} has source {line.source} and simulator {line.simulator}:"
                    f" expected one of {', '.join(sorted(sources))} and one of {', '.join(sorted(simulators))}"
                )
        if self.question.count("{vector}") != 1:
            raise ValueError(f"question is {self.question!r}: expected {{vector}} in it once")
        if self.headline_fraction not in self.fractions:
            raise ValueError(f"headline_fraction is {self.headline_fraction}: expected one of {self.fractions}")
        if self.headline not in {line.name for line in self.lines}:
            raise ValueError(f"headline is {self.headline!r}: expected the name of a line")
        return self
