"""Writing the page of one coder's latents from its exemplars and any files of descriptions. No Ray, no model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from introspect_ray.config import BrowseConfig
from introspect_ray.data.description_files import read_descriptions
from introspect_ray.data.storage import Folder
from introspect_ray.evaluation.latents_page import page_files
from introspect_ray.features.descriptions import Description, by_latent, ranked_by
from introspect_ray.features.exemplar_store import open_exemplars


def browse_latents(config: BrowseConfig, progress: Callable[[int, int], None]) -> str:
    """Write the page; one line about it. Raises UserError for exemplars or descriptions that cannot be read."""
    store = open_exemplars(config.exemplars)
    everything = [one for path in config.descriptions for one in read_descriptions(path)]
    own = [one for one in everything if one.layer == store.meta.layer and one.latent < store.meta.num_latents]
    descriptions = {latent: ranked_by(config.score, found) for (_, latent), found in by_latent(own).items()}
    folder = Folder(config.output or f"{store.url}/page")
    num_files = 0
    for name, content in page_files(store, descriptions, config, progress):
        folder.write(name, content.encode())
        num_files += 1
    return (
        f"wrote {folder.url}/index.html and {num_files - 1} files of data: {store.meta.num_live} latents that fire,"
        f" {len(descriptions)} described{_scored(own, config.score)}{_aside(len(everything) - len(own))}"
    )


def _scored(descriptions: Sequence[Description], score: str) -> str:
    """How many latents are ranked; where none is, which scores there are."""
    ranked = {one.latent for one in descriptions if one.scores.get(score) is not None}
    if ranked or not descriptions:
        return f", {len(ranked)} of them ranked by {score}" if ranked else ""
    there = ", ".join(sorted({name for one in descriptions for name in one.scores})) or "none"
    return f"; no description has the score {score} to rank by (scores found: {there})"


def _aside(others: int) -> str:
    return f"; {others} descriptions are of other layers or latents" if others else ""
