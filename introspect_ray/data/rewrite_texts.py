"""The texts of a rewriting run, in shards: what is fitted on, what statistics come from, what is evaluated on.

A text's split is a hash of the text, the same that exemplars are collected by (CollectConfig.split): simulators train
on `train`, so statistics come from there, scales are fitted on `validation`, and `test` is evaluated on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from introspect_ray.config import RewriteConfig
from introspect_ray.data.sources import load_source
from introspect_ray.data.splits import split_of
from introspect_ray.errors import UserError
from introspect_ray.features.windows import Window, window
from introspect_ray.models.tokens import adds_bos, encode_with_offsets
from introspect_ray.rewrite.texts import RewriteText, every_position, rewrite_text

Use = Literal["statistics", "fit", "evaluation"]
SPLIT_OF_USE: dict[Use, str] = {"statistics": "train", "fit": "validation", "evaluation": "test"}
STATISTICS_SHARDS = 4
"""Statistics texts are not simulated, and go into shards so many times larger."""


@dataclass(frozen=True)
class TextShard:
    """Some texts, with the windows of them that a simulator sees; statistics texts have none."""

    name: str
    texts: tuple[RewriteText, ...]
    windows: tuple[Window, ...]


def text_shards(config: RewriteConfig, tokenizer: PreTrainedTokenizerBase) -> dict[Use, list[TextShard]]:
    """Shards by use, the first usable texts of each split. Raises UserError if a split has too few."""
    rows = load_source(config.source, "text", ("text",)).rows
    counts: dict[Use, int] = {
        "statistics": config.statistics_texts,
        "fit": config.fit_texts,
        "evaluation": config.evaluation_texts,
    }
    shards: dict[Use, list[TextShard]] = {}
    for use, count in counts.items():
        split = SPLIT_OF_USE[use]
        texts = _usable(
            [row for row in rows if split_of(row["text"], config.split) == split], use, count, config, tokenizer
        )
        if len(texts) < count:
            raise UserError(
                f"source {config.source.path} has {len(texts)} texts of three tokens and more in the split {split}:"
                f" expected {count} ({use}_texts)"
            )
        texts.sort(key=lambda text: len(text.ids))  # those of a shard are padded to the longest one
        size = config.texts_per_shard * (STATISTICS_SHARDS if use == "statistics" else 1)
        shards[use] = _shards(use, texts, size, tokenizer)
    shards["statistics"] = [replace(shard, windows=()) for shard in shards["statistics"]]
    return shards


def _usable(
    rows: Sequence[dict[str, Any]], use: Use, count: int, config: RewriteConfig, tokenizer: PreTrainedTokenizerBase
) -> list[RewriteText]:
    """The first texts; statistics and scales are of all tokens of their windows, whatever the evaluation measures."""
    bos = adds_bos(tokenizer)
    texts: list[RewriteText] = []
    for row in rows:
        if len(texts) == count:
            break
        ids, _ = encode_with_offsets(tokenizer, row["text"])
        text = rewrite_text(row["row"], ids, config.where, config.window_tokens, bos, config.seed)
        if text is not None:
            texts.append(text if use == "evaluation" else every_position(text))
    return texts


def _shards(use: Use, texts: Sequence[RewriteText], size: int, tokenizer: PreTrainedTokenizerBase) -> list[TextShard]:
    return [
        TextShard(
            f"{use}-{start // size:05d}",
            tuple(texts[start : start + size]),
            tuple(window(text.window, tokenizer) for text in texts[start : start + size]),
        )
        for start in range(0, len(texts), size)
    ]
