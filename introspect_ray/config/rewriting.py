"""The job that rewrites a target with simulated latents."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from introspect_ray.config.base import Config, Fraction
from introspect_ray.config.resources import ActorConfig, ModelConfig, SourceConfig
from introspect_ray.config.simulators import SimulatorConfig
from introspect_ray.config.tasks import SplitConfig

Name = Annotated[str, Field(pattern=r"^\w[\w .:+()-]{0,39}$")]
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
    scale: Literal["raw", "linear", "quantile", "detected", "context"] = "quantile"
    """From level to activation: one unit for all; linear up to each latent's maximum (P2); quantile-normalised;
    first whether it fires, then how strongly; the same with a threshold that depends on the context."""
    repaired: Literal["nothing", "false_alarms", "misses", "both"] = "nothing"
    """What an oracle corrects, to tell what is wrong: activations where there are none, missing ones, or both, which
    leaves wrong strengths alone."""
    max_fraction: Fraction = 1.0


def _needed_most(name: str, **changes: Any) -> RewriteLineConfig:
    """A line about the latents that the loss needs most, where it shows what simulation loses."""
    return RewriteLineConfig(name=name, selection="contribution", max_fraction=0.4, **changes)


POCKET_LINES = (
    RewriteLineConfig(name="deleted", kind="deleted"),
    RewriteLineConfig(name="oracle", kind="oracle", max_fraction=0.2),
    RewriteLineConfig(name="oracle levels", kind="oracle_levels"),
    RewriteLineConfig(name="lexicon quantile"),
    RewriteLineConfig(name="lexicon linear", scale="linear"),
    RewriteLineConfig(name="lexicon raw", scale="raw", max_fraction=0.4),
    RewriteLineConfig(name="shuffled", descriptions="shuffled", max_fraction=0.4),
    RewriteLineConfig(name="no description", source="none", max_fraction=0.4),
    RewriteLineConfig(name="random: deleted", kind="deleted", selection="random", max_fraction=0.4),
    RewriteLineConfig(name="random: quantile", selection="random", max_fraction=0.4),
    _needed_most("needed: deleted", kind="deleted"),
    _needed_most("needed: oracle levels", kind="oracle_levels"),
    _needed_most("needed: quantile"),
    _needed_most("needed: linear", scale="linear"),
    _needed_most("needed: shuffled", descriptions="shuffled"),
    _needed_most("needed: no description", source="none"),
    _needed_most("needed: exact reader", simulator="exact"),
    _needed_most("needed: no false alarms", repaired="false_alarms"),
    _needed_most("needed: no misses", repaired="misses"),
    _needed_most("needed: neither", repaired="both"),
    _needed_most("needed: detected", scale="detected"),
    _needed_most("needed: context", scale="context"),
    _needed_most("needed: contrast", descriptions="contrast"),
    _needed_most("needed: max of several", descriptions="max"),
    _needed_most("needed: mean of several", descriptions="mean"),
)


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
    evaluation_texts: Annotated[int, Field(ge=2)] = 240
    """Texts of the test split that losses are of."""
    fit_texts: Annotated[int, Field(ge=1)] = 160
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
    """Folder of a trained explainer: adds its descriptions as the source and the line `explainer`."""
    simulator: str | None = None
    """Folder of a trained simulator, to take instead of training the first one of `simulators`."""
    training_steps: Annotated[int, Field(ge=1)] = 600
    """Steps that a simulator of kind `pocket` is trained for."""
    held_out_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the descriptions that it is not trained on; with 0 it knows all of them, from other texts."""
    simulators: tuple[RewriteSimulatorConfig, ...] = (
        RewriteSimulatorConfig(),
        RewriteSimulatorConfig(name="exact", kind="exact"),
    )
    lines: tuple[RewriteLineConfig, ...] = POCKET_LINES
    fractions: tuple[Annotated[float, Field(gt=0, le=1)], ...] = P2_FRACTIONS
    """Shares of the live latents that are replaced."""
    headline: str = "lexicon quantile"
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
        if self.headline_fraction not in self.fractions:
            raise ValueError(f"headline_fraction is {self.headline_fraction}: expected one of {self.fractions}")
        if self.headline not in {line.name for line in self.lines}:
            raise ValueError(f"headline is {self.headline!r}: expected the name of a line")
        return self
