"""Fitted projections on disk: `projections.safetensors` and `alignment.json`, which is written last.

Legend: M target width, E explainer width.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from introspect_ray.errors import UserError
from introspect_ray.explainer.card import PROJECTIONS_FILE, local_copy, local_target

ALIGNMENT_FILE = "alignment.json"


class AlignmentCard(BaseModel):
    """`alignment.json`, written last: what the maps were fitted on and how much of the embeddings they explain."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: str
    """Equal for equal texts, models and settings."""
    target_path: str
    target_width: int
    explainer_path: str
    explainer_width: int
    layers: tuple[int, ...]
    num_pairs: int
    """Pairs of tokens that the maps were fitted on."""
    num_unaligned: int
    """Tokens of the target at whose end no token of the explainer ends."""
    explained: dict[int, float]
    """Layer -> share of the embeddings' variance explained on texts that were not fitted on."""


def save_alignment(maps: Mapping[int, Float[Tensor, "E M"]], card: AlignmentCard, folder: str) -> None:
    """Write the maps under the state keys of `Projections`, then the card."""
    with local_target(folder) as path:
        (path / ALIGNMENT_FILE).unlink(missing_ok=True)
        save_file({f"{layer}.weight": weight for layer, weight in maps.items()}, path / PROJECTIONS_FILE)
        temporary = path / f".{ALIGNMENT_FILE}.tmp"
        temporary.write_text(json.dumps(card.model_dump(mode="json"), indent=2) + "\n", encoding="utf-8")
        temporary.replace(path / ALIGNMENT_FILE)


def read_alignment(folder: str) -> AlignmentCard:
    """The card of a folder (path or fsspec URL) that `save_alignment` wrote.

    Raises:
        UserError: the folder has no card, or the card is not one that this version understands.
    """
    with _readable(folder) as path:
        return AlignmentCard.model_validate_json((path / ALIGNMENT_FILE).read_text(encoding="utf-8"))


def read_maps(folder: str) -> dict[int, Float[Tensor, "E M"]]:
    """The maps by layer.

    Raises:
        UserError: files are missing or damaged, or a map does not have the card's shape or is not finite.
    """
    card = read_alignment(folder)
    with _readable(folder) as path:
        tensors = load_file(path / PROJECTIONS_FILE)
    maps = {layer: tensors.get(f"{layer}.weight") for layer in card.layers}
    for layer, weight in maps.items():
        shape = (card.explainer_width, card.target_width)
        if weight is None or tuple(weight.shape) != shape or not bool(weight.isfinite().all()):
            raise UserError(f"{folder}/{PROJECTIONS_FILE}: layer {layer} has no finite map of {shape[0]} x {shape[1]}")
    return {layer: weight for layer, weight in maps.items() if weight is not None}


@contextmanager
def _readable(folder: str) -> Iterator[Path]:
    """A local copy of the folder; whatever is wrong with its files is a UserError that names it."""
    try:
        with local_copy(folder) as path:
            yield path
    except (FileNotFoundError, NotADirectoryError) as error:
        missing = Path(error.filename or ALIGNMENT_FILE).name
        raise UserError(f"{folder} is no fitted projection: it has no {missing}") from None
    except (OSError, ValidationError, ValueError, SafetensorError) as error:
        raise UserError(f"fitted projection {folder} cannot be read: {str(error).splitlines()[0]}") from None
