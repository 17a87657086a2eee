"""Descriptions of latents: what one encodes, in words, where the words come from and how well they did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Description:
    """One candidate description of one latent; a latent may have several."""

    layer: int
    latent: int
    text: str
    source: str
    """Who says so, such as `lexicon`, `neuronpedia`, `delphi`, `llm:NAME` or `explainer:NAME`."""
    scores: Mapping[str, float | None] = field(default_factory=dict)
    """Name of a score -> its value, or none where it could not be computed."""
