"""Exemplars that others collected, as exemplars of ours: Neuronpedia's bulk files of one source. No Ray, no model.

    features/batch-N, activations/batch-N --lines--> windows with the target's token ids --blocks of latents--> OUTPUT

One block of latents is in memory at a time. Such exemplars are the strongest windows and some from each interval; there
are none at the natural base rate, so that what needs those (precision, recall) is not to be had from them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import pyarrow as pa
from transformers import BatchEncoding, PreTrainedTokenizerBase

from introspect_ray.config import ImportExemplarsConfig, resolved
from introspect_ray.data.identity import identify_target
from introspect_ray.data.merging import stats_bytes
from introspect_ray.data.splits import SPLITS, split_of
from introspect_ray.data.storage import Folder, new_folder
from introspect_ray.errors import UserError
from introspect_ray.features import neuronpedia
from introspect_ray.features.collection import Rows
from introspect_ray.features.contexts import window_ids
from introspect_ray.features.exemplar_store import (
    LATENTS_NAME,
    META_NAME,
    SCHEMA_VERSION,
    ExemplarMeta,
    block_name,
    encoded,
    row_table,
    window_table,
)
from introspect_ray.features.neuronpedia_activations import (
    Activation,
    Feature,
    intervals_of,
    read_activations,
    read_features,
)
from introspect_ray.features.picking import QUANTILE, TOP, Picked
from introspect_ray.features.windows import Window, window
from introspect_ray.models.loading import load_tokenizer
from introspect_ray.tasks.base import stable_id


def import_exemplars(config: ImportExemplarsConfig) -> str:
    """Write the exemplars of a source; one line about them. Raises UserError for files that are not as expected."""
    folder = Folder(config.source)
    features = list(read_features(_batches(folder, "features")))
    sources = sorted({one.source for one in features})
    if len(sources) != 1:
        raise UserError(f"source {config.source} has features of {', '.join(sources) or 'none'}, expected those of one")
    target = identify_target(config.target)
    counts = _Counts(features)
    tokenizer = load_tokenizer(config.target)
    with new_folder(config.output) as output:
        files: dict[str, int] = {}
        for block, found in _blocks(read_activations(_batches(folder, "activations")), config, counts):
            for name, content in _block_files(block, found, tokenizer, config, counts).items():
                output.write(name, content)
                files[name] = len(content)
        if not counts.reasons["used"]:
            raise UserError(f"source {config.source} holds no usable activation{counts.listed}")
        stats = stats_bytes(counts.firing, counts.maxima, counts.densities)
        output.write(LATENTS_NAME, stats)
        meta = ExemplarMeta(
            schema_version=SCHEMA_VERSION,
            run_key=stable_id(resolved(config), files),
            config=resolved(config),
            target=target.model_dump(mode="json"),
            coder=f"neuronpedia:{sources[0]}",
            coder_digest="",
            kind=config.kind,
            layer=features[0].layer,
            num_latents=len(counts.firing),
            num_live=int((counts.firing > 0).sum()),
            num_tokens=counts.num_tokens,
            num_not_finite=0,
            texts=dict(counts.reasons),
            top=max(1, counts.top),
            latents_per_block=config.latents_per_block,
            files={LATENTS_NAME: len(stats), **files},
        )
        output.write(META_NAME, (meta.model_dump_json(indent=1) + "\n").encode())
    return (
        f"wrote {config.output}: {counts.reasons['used']} windows of {meta.num_live} of {meta.num_latents} latents"
        f"{counts.listed}"
    )


class _Counts:
    """What is known of every latent, and what became of the lines."""

    def __init__(self, features: Sequence[Feature]):
        size = 1 + max(one.latent for one in features)
        self.firing = np.zeros(size, np.int64)
        """Tokens in the windows on which each latent fires."""
        self.maxima = np.zeros(size, np.float32)
        self.densities = np.zeros(size)
        for one in features:
            self.densities[one.latent] = one.density
        self.num_tokens = 0
        """Tokens of all windows."""
        self.top = 0
        """Strongest windows of a latent and split, at most."""
        self.reasons: Counter[str] = Counter()

    @property
    def listed(self) -> str:
        others = sorted((reason, count) for reason, count in self.reasons.items() if reason != "used")
        return "".join(f"; {count} not used: {reason}" for reason, count in others)


def _batches(folder: Folder, kind: str) -> Iterator[tuple[str, bytes]]:
    """Batches of a kind, by number. Raises UserError if there are none, or they are of several sources."""
    found: list[tuple[str, int, str]] = []
    for path in folder.files():
        parent, _, name = path.rpartition("/")
        number = neuronpedia.batch_number(name)
        if number is not None and parent.rpartition("/")[2] == kind:
            found.append((parent, number, path))
    if len({parent for parent, *_ in found}) != 1:
        raise UserError(
            f"source {folder.url} holds {len({parent for parent, *_ in found})} folders {kind}/ with batch-N.jsonl.gz,"
            " expected one: give the folder of one source"
        )
    return ((path, folder.read(path)) for *_, path in sorted(found))


def _blocks(
    lines: Iterator[Activation | tuple[str, str]], config: ImportExemplarsConfig, counts: _Counts
) -> Iterator[tuple[int, list[Activation]]]:
    """(block, its activations) of every block of latents, empty ones too."""
    done = -1

    def usable() -> Iterator[Activation]:
        for line in lines:
            if isinstance(line, tuple):
                counts.reasons[line[1]] += 1
            elif line.latent >= len(counts.firing):
                counts.reasons["latent_without_features"] += 1
            else:
                yield line

    for block, found in groupby(usable(), key=lambda one: one.latent // config.latents_per_block):
        if block <= done:
            raise UserError(f"source {config.source}: its activations are not ordered by index, expected them to be")
        yield from ((empty, []) for empty in range(done + 1, block))
        yield block, list(found)
        done = block
    yield from ((empty, []) for empty in range(done + 1, -(-len(counts.firing) // config.latents_per_block)))


@dataclass
class _Block:
    """Windows and rows of a block, as they come."""

    windows: dict[int, tuple[Window, int]] = field(default_factory=dict)
    """Id -> window and split."""
    rows: list[tuple[int, int, int, np.ndarray, int, int]] = field(default_factory=list)
    """(latent, split, id of the window, activations, kind, quantile)"""


def _block_files(
    block: int,
    found: Sequence[Activation],
    tokenizer: PreTrainedTokenizerBase,
    config: ImportExemplarsConfig,
    counts: _Counts,
) -> dict[str, bytes]:
    made = _Block()
    for latent, group in groupby(sorted(found, key=lambda one: one.latent), key=lambda one: one.latent):
        _add_latent(made, latent, list(group), tokenizer, config, counts)
    ids = np.array(list(made.windows), dtype=np.uint64)
    windows = [window for window, _ in made.windows.values()]
    splits = np.array([split for _, split in made.windows.values()], dtype=np.int64)
    table = window_table(ids, splits, windows).append_column("random", pa.array([False] * len(windows), pa.bool_()))
    return {
        block_name("blocks", block): encoded(row_table([_picked(made)])),
        block_name("windows", block): encoded(table),
    }


def _add_latent(
    made: _Block,
    latent: int,
    found: Sequence[Activation],
    tokenizer: PreTrainedTokenizerBase,
    config: ImportExemplarsConfig,
    counts: _Counts,
) -> None:
    intervals = intervals_of(found)
    seen: set[int] = set()
    tops: Counter[int] = Counter()
    for one in sorted(found, key=lambda one: -max(one.values)):
        window, values = _window(one, tokenizer)
        if window is None:
            counts.reasons["tokens_are_not_the_targets"] += 1
            continue
        number = int(window_ids("\x1f".join(window.pieces), 1)[0])
        if number in seen:
            counts.reasons["duplicate_row"] += 1
            continue
        seen.add(number)
        split = SPLITS.index(split_of(window.text, config.split))
        kind, quantile = (TOP, -1) if one.interval is None else (QUANTILE, intervals[one.interval])
        made.windows[number] = (window, split)
        made.rows.append((latent, split, number, values, kind, quantile))
        counts.reasons["used"] += 1
        counts.num_tokens += len(window)
        counts.firing[latent] += int((values > 0).sum())
        counts.maxima[latent] = max(counts.maxima[latent], values.max())
        tops[split] += kind == TOP
        counts.top = max(counts.top, tops[split])


def _window(one: Activation, tokenizer: PreTrainedTokenizerBase) -> tuple[Window | None, np.ndarray]:
    """The window with the target's token ids, without the begin-of-text token, and its activations.

    None if the target's tokenizer cuts the text elsewhere, or if the latent fires at that token alone.
    """
    first = 1 if one.tokens[0] == tokenizer.bos_token else 0
    pieces, values = one.tokens[first:], np.array(one.values[first:], dtype=np.float32)
    encoded_text = tokenizer(
        "".join(pieces),
        add_special_tokens=False,
        split_special_tokens=True,
        return_offsets_mapping=tokenizer.is_fast,
        verbose=False,
    )
    ids = encoded_text.input_ids
    if len(ids) != len(pieces) or not values.any() or not _cut_alike(ids, encoded_text, pieces, tokenizer):
        return None, values
    return Window(tuple(ids), pieces), values


def _cut_alike(
    ids: Sequence[int], encoded_text: BatchEncoding, pieces: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> bool:
    """Whether token by token the text is what the pieces say; some tokenizers drop the space before a text."""
    text = "".join(pieces)
    offsets = encoded_text.get("offset_mapping") or []
    if [text[start:end] for start, end in offsets] == list(pieces):
        return True
    # Offsets may leave out spaces, and say the same of every token of one character.
    found = window(ids, tokenizer).pieces
    return found[1:] == tuple(pieces[1:]) and found[0].lstrip() == pieces[0].lstrip()


def _picked(made: _Block) -> Picked:
    positions = [np.flatnonzero(values) for *_, values, _, _ in made.rows]
    rows = Rows(
        np.array([row[0] for row in made.rows], np.int32),
        np.array([row[1] for row in made.rows], np.int8),
        np.array([row[2] for row in made.rows], np.uint64),
        np.array([row[3].max() for row in made.rows], np.float32),
        np.concatenate([[0], np.cumsum([len(at) for at in positions], dtype=np.int64)]),
        np.concatenate([np.empty(0, np.uint16), *positions]).astype(np.uint16),
        np.concatenate([np.empty(0, np.float32), *(row[3][at] for row, at in zip(made.rows, positions, strict=True))]),
    )
    kinds, quantiles = np.array([row[4:] for row in made.rows], np.int64).reshape(-1, 2).T
    return Picked(rows, kinds, quantiles)
