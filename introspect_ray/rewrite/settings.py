"""What a run really does: shorthands of the config spelled out, and P2's protocol in place of ours."""

from __future__ import annotations

from introspect_ray.config import (
    P2_FRACTIONS,
    DescriptionSourceConfig,
    ModelConfig,
    RewriteConfig,
    RewriteLineConfig,
    RewriteSimulatorConfig,
    SimulatorConfig,
)

EXPLAINER = "explainer"
P2_WINDOW = 32
P2_TOP_K = 32


def effective(config: RewriteConfig) -> RewriteConfig:
    """The config with `explainer`, `simulator` and `paper_compat` spelled out, checked anew."""
    changes: dict[str, object] = {}
    if config.simulator is not None:
        first = config.simulators[0]
        model = SimulatorConfig(model=ModelConfig(path=config.simulator))
        given = RewriteSimulatorConfig(name=first.name, kind="given", given=model)
        changes["simulators"] = (given, *config.simulators[1:])
    if config.explainer is not None:
        source = DescriptionSourceConfig(name=EXPLAINER, kind="explainer", path=config.explainer)
        changes["sources"] = (*config.sources, source)
        changes["lines"] = (*config.lines, *_explainer_lines(config))
    if config.paper_compat:
        changes |= _paper(config)
    changes |= {"explainer": None, "simulator": None}
    return RewriteConfig.model_validate(config.model_dump() | {name: _plain(value) for name, value in changes.items()})


def _explainer_lines(config: RewriteConfig) -> list[RewriteLineConfig]:
    """On the latents that the loss needs most, by every simulator, as far as the headline goes."""
    return [
        RewriteLineConfig(
            name=f"needed: {EXPLAINER}, {simulator.name}",
            source=EXPLAINER,
            simulator=simulator.name,
            selection="contribution",
            max_fraction=config.headline_fraction,
        )
        for simulator in config.simulators
    ]


def _paper(config: RewriteConfig) -> dict[str, object]:
    told = {"source": config.sources[0].name, "simulator": config.simulators[0].name, "scale": "linear"}
    lines = (
        RewriteLineConfig.model_validate({"name": "best scored", "selection": "score", **told}),
        RewriteLineConfig.model_validate({"name": "random", "selection": "random", **told}),
    )
    return {
        "where": "last",
        "window_tokens": P2_WINDOW,
        "top_k": P2_TOP_K,
        "fractions": P2_FRACTIONS,
        "lines": lines,
        "headline": "best scored",
    }


def _plain(value: object) -> object:
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    dump = getattr(value, "model_dump", None)
    return dump() if dump is not None else value
