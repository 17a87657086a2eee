"""Fitting projections before training: checks, texts, and a folder that says what it was fitted on. No Ray here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from introspect_ray.config import FitProjectionConfig, resolved
from introspect_ray.data.identity import identify_target
from introspect_ray.data.sources import load_source
from introspect_ray.data.storage import TEMPORARY, Folder
from introspect_ray.errors import UserError
from introspect_ray.explainer.card import PROJECTIONS_FILE
from introspect_ray.explainer.fitted import ALIGNMENT_FILE, AlignmentCard, read_alignment, save_alignment
from introspect_ray.tasks.base import stable_id


@dataclass(frozen=True)
class Fitted:
    """A folder with maps, and whether it was there before."""

    output: str
    card: AlignmentCard
    was_complete: bool

    @property
    def line(self) -> str:
        """One line for people."""
        start = f"{self.output} was already complete" if self.was_complete else f"wrote {self.output}"
        shares = ", ".join(f"layer {layer}: {share:.2f}" for layer, share in self.card.explained.items())
        return (
            f"{start}: maps fitted on {self.card.num_pairs} pairs of tokens;"
            f" held-out variance of the embeddings explained at {shares}"
        )


def fit_projection(config: FitProjectionConfig, progress: Callable[[int, int], None]) -> Fitted:
    """Fit the maps that `config` describes, unless its folder holds them already; `progress` hears (texts, of all).

    Raises:
        UserError: bad input, before any model loads, or an output folder of something else.
    """
    target, base = identify_target(config.target), identify_target(config.explainer)
    if config.layers is not None and (not config.layers or max(config.layers) >= target.num_layers):
        raise UserError(
            f"layers is {list(config.layers)}, but {target.path} has {target.num_layers} layers:"
            f" expected some of 0 to {target.num_layers - 1}"
        )
    texts = [row["text"] for row in load_source(config.source, "text", ("text",)).rows]
    key = stable_id(_relevant(config), texts, target.model_dump(), base.model_dump())
    if _is_there(Folder(config.output), key):
        return Fitted(config.output, read_alignment(config.output), was_complete=True)
    from introspect_ray.explainer.alignment import fit_alignment  # slow to load, and bad input was to be told first

    maps, card = fit_alignment(config, texts, key, progress)
    save_alignment(maps, card, config.output)
    return Fitted(config.output, card, was_complete=False)


def _relevant(config: FitProjectionConfig) -> dict[str, object]:
    """The config without what cannot change the maps; texts and models are known by their contents."""
    update = {name: getattr(FitProjectionConfig(), name) for name in ("output", "target", "explainer", "source")}
    return resolved(config.model_copy(update=update))


def _is_there(folder: Folder, key: str) -> bool:
    """Whether the folder holds these very maps. Refuses one that holds something else."""
    # Maps without a card were left by a fit that was stopped before it had written its card: they are fitted again.
    unfinished = (TEMPORARY, PROJECTIONS_FILE, f".{ALIGNMENT_FILE}")
    names = [name for name in folder.names() if not name.startswith(unfinished)]
    if not names:
        return False
    if ALIGNMENT_FILE not in names:
        raise UserError(
            f"output folder {folder.url} is not empty and holds no fitted projection ({names[0]}, ...): choose another"
        )
    if read_alignment(folder.url).key != key:
        raise UserError(f"output folder {folder.url} holds a projection of another config: choose another or delete it")
    return True
