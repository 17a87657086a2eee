"""Stages of the pocket build that make the SAE and the transcoder of a target, and their labels.

Each leaves a folder with the coder in sae-lens format, `labels.jsonl`, and `training.json` with what was measured.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from introspect_ray.config import PocketSparseConfig
from introspect_ray.features.activations import mlp_inputs_outputs, residual_outputs
from introspect_ray.features.batch_topk import BatchTopKConfig, Progress, train_skip_transcoder
from introspect_ray.features.coder import ActiveLatents, Kind, SparseCoder, fraction_unexplained
from introspect_ray.features.labelling import LabellingConfig, LatentLabel, Membership, Sample, label_latents
from introspect_ray.features.sae import load_sae, save_transcoder
from introspect_ray.features.sae_training import train_sae
from introspect_ray.interventions.target import Target
from introspect_ray.models.tokens import encode_with_offsets
from introspect_ray.pocket.annotation import Word, annotate, knowledge
from introspect_ray.pocket.lexicon import Lexicon, without_rare
from introspect_ray.pocket.text import Corpus
from introspect_ray.pocket.world import World

LABELS_FILE = "labels.jsonl"
REPORT_FILE = "training.json"

StageProgress = Callable[[str, int, int, float], None]
"""Called with the stage, steps done, steps in all, and the loss."""

TRAIN_SEED, FIT_SEED, HELD_OUT_SEED = 1001, 1002, 1003
"""Seeds of the corpora to train coders on, to choose labels on, and to score labels and reconstructions on."""


def build_sae(
    folder: Path, target: Target, world: World, config: PocketSparseConfig, seed: int, progress: StageProgress
) -> CoderReport:
    """Train the SAE of `config` on fresh texts, write it to `folder`, and label its latents."""
    return _build(train_pocket_sae, "sae", folder, target, world, config, seed, progress)


def build_transcoder(
    folder: Path, target: Target, world: World, config: PocketSparseConfig, seed: int, progress: StageProgress
) -> CoderReport:
    """The same for the skip transcoder."""
    return _build(train_pocket_transcoder, "transcoder", folder, target, world, config, seed, progress)


def _build(
    train: Callable[[PreTrainedModel, Texts, PocketSparseConfig, Path, int, Progress], None],
    stage: Kind,
    folder: Path,
    target: Target,
    world: World,
    config: PocketSparseConfig,
    seed: int,
    progress: StageProgress,
) -> CoderReport:
    texts = sample_texts(world, target.tokenizer, config.documents, TRAIN_SEED)
    train(target.model, texts, config, folder, seed, lambda step, loss: progress(stage, step, config.steps, loss))
    report = label_pocket_coder(target.model, labelled_texts(world, target.tokenizer, config), config, folder)
    (folder / REPORT_FILE).write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
    return report


@dataclass(frozen=True, eq=False)
class Texts:
    """Documents of one corpus sample: ids with begin-of-text, and the word of every later token, all in one row."""

    ids: list[list[int]]
    words: list[Word | None]


def sample_texts(world: World, tokenizer: PreTrainedTokenizerBase, count: int, seed: int) -> Texts:
    """`count` documents from the corpus of this seed."""
    corpus = Corpus(world, seed)
    known = knowledge(world)
    texts = Texts([], [])
    for _ in range(count):
        document = corpus.document()
        ids, offsets = encode_with_offsets(tokenizer, document.text)
        texts.ids.append(ids)
        texts.words.extend(annotate(document, offsets, known)[1:])
    return texts


def training_rows(texts: Texts, rows_per_word: int, seed: int) -> torch.Tensor:
    """Numbers of the tokens to train on, in order: of each word `rows_per_word` at random, or all it has if fewer."""
    order = torch.randperm(len(texts.words), generator=torch.Generator().manual_seed(seed)).tolist()
    taken: Counter[str] = Counter()
    rows: list[int] = []
    for row in order:
        word = texts.words[row]
        if word is not None and taken[word.text] < rows_per_word:
            taken[word.text] += 1
            rows.append(row)
    return torch.tensor(sorted(rows))


def _training(config: PocketSparseConfig, num_latents: int, num_active: int, seed: int) -> BatchTopKConfig:
    return BatchTopKConfig(
        num_latents=num_latents,
        num_active=num_active,
        steps=config.steps,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        dead_after=config.dead_after,
        seed=seed,
    )


def train_pocket_sae(
    model: PreTrainedModel, texts: Texts, config: PocketSparseConfig, folder: Path, seed: int, progress: Progress
) -> None:
    """An SAE of the residual output of `config.sae_layer`, in sae-lens format in `folder`."""
    x = residual_outputs(model, texts.ids, config.sae_layer)[training_rows(texts, config.rows_per_word, seed)]
    metadata = {"model_name": "pocket:target_a", "hook_name": f"blocks.{config.sae_layer}.hook_resid_post"}
    train_sae(x, _training(config, config.sae_latents, config.sae_active, seed), metadata, folder, progress)


def train_pocket_transcoder(
    model: PreTrainedModel, texts: Texts, config: PocketSparseConfig, folder: Path, seed: int, progress: Progress
) -> None:
    """A skip transcoder of the MLP of `config.transcoder_layer`, in sae-lens format in `folder`."""
    layer = config.transcoder_layer
    x, y = mlp_inputs_outputs(model, texts.ids, layer)
    training = _training(config, config.transcoder_latents, config.transcoder_active, seed)
    rows = training_rows(texts, config.rows_per_word, seed)
    coder = train_skip_transcoder(x[rows], y[rows], training, layer, progress)
    hooks = {"hook_name": f"blocks.{layer}.mlp.hook_in", "hook_name_out": f"blocks.{layer}.hook_mlp_out"}
    save_transcoder(coder, folder, {"model_name": "pocket:target_a", **hooks})


@dataclass(frozen=True, eq=False)
class LabelledTexts:
    """Two samples with the lexicon's categories: labels are chosen on `fit` and scored on `held_out`."""

    fit: Texts
    held_out: Texts
    lexicon: Lexicon
    fit_membership: Membership
    held_out_membership: Membership


def labelled_texts(world: World, tokenizer: PreTrainedTokenizerBase, config: PocketSparseConfig) -> LabelledTexts:
    """Fresh samples; categories are those that occur often enough in the fit sample."""
    fit = sample_texts(world, tokenizer, config.documents, FIT_SEED)
    held_out = sample_texts(world, tokenizer, config.documents, HELD_OUT_SEED)
    lexicon = Lexicon()
    samples = [lexicon.membership(fit.words, grow=True), lexicon.membership(held_out.words, grow=False)]
    lexicon.catalog, (fit_membership, held_out_membership) = without_rare(
        lexicon.catalog, samples, config.minimum_tokens
    )
    return LabelledTexts(fit, held_out, lexicon, fit_membership, held_out_membership)


@dataclass(frozen=True)
class CoderReport:
    """What the manifest says about one coder; shares of variance and counts are of the held-out sample."""

    kind: Kind
    layer: int
    num_latents: int
    unexplained: float
    """Fraction of variance unexplained."""
    unexplained_without_latents: float
    """The same with all latents at zero: for a transcoder, what its skip alone leaves."""
    active_per_token: float
    live: int
    labelled: int
    """Live latents whose label has F1 >= `accepted_score` on held-out texts."""
    labels_by_kind: dict[str, int]


@torch.no_grad()
def label_pocket_coder(
    model: PreTrainedModel, texts: LabelledTexts, config: PocketSparseConfig, folder: Path
) -> CoderReport:
    """Label the live latents of the coder in `folder` by the lexicon and write `labels.jsonl` beside it."""
    coder = load_sae(str(folder))
    fit_x, _ = _read_and_written(model, coder, texts.fit)
    x, y = _read_and_written(model, coder, texts.held_out)
    held_out = coder.encode_sparse(x)
    labelling = LabellingConfig(
        active_share=config.active_share,
        minimum_firings=config.minimum_firings,
        margin=config.margin,
        accepted_score=config.accepted_score,
    )
    labels = label_latents(
        coder.layer,
        texts.lexicon.catalog,
        _without_long(Sample(coder.encode_sparse(fit_x), texts.fit_membership), fit_x, config.longest),
        _without_long(Sample(held_out, texts.held_out_membership), x, config.longest),
        labelling,
    )
    write_labels(folder / LABELS_FILE, labels)
    return _report(coder, x, y, held_out, labels, config.accepted_score)


def _without_long(sample: Sample, x: torch.Tensor, longest: float) -> Sample:
    """The sample without the activity and categories of vectors longer than `longest` times the median length.

    A few tokens serve as attention sinks and are many times longer than all others. So long a vector drives many
    latents above their threshold, which says nothing about what they encode.
    """
    lengths = x.norm(dim=-1)
    usual = lengths <= longest * lengths.median()
    active, members = sample.active, sample.membership
    entries, stays = usual[active.vectors], usual.numpy()[members.tokens]
    kept = replace(
        active, vectors=active.vectors[entries], latents=active.latents[entries], values=active.values[entries]
    )
    return Sample(kept, replace(members, tokens=members.tokens[stays], categories=members.categories[stays]))


def _read_and_written(model: PreTrainedModel, coder: SparseCoder, texts: Texts) -> tuple[torch.Tensor, torch.Tensor]:
    """What the coder reads, and what its output stands for: the same for an SAE."""
    if coder.kind == "transcoder":
        return mlp_inputs_outputs(model, texts.ids, coder.layer)
    x = residual_outputs(model, texts.ids, coder.layer)
    return x, x


def _report(
    coder: SparseCoder,
    x: torch.Tensor,
    y: torch.Tensor,
    active: ActiveLatents,
    labels: list[LatentLabel],
    accepted_score: float,
) -> CoderReport:
    good = [label for label in labels if label.score >= accepted_score]
    predicted = torch.cat([coder.forward(part) for part in x.split(8192)])
    nothing = torch.zeros(len(x), 1).expand(-1, coder.num_latents)
    kinds = sorted({label.kind for label in good})
    return CoderReport(
        kind=coder.kind,
        layer=coder.layer,
        num_latents=coder.num_latents,
        unexplained=fraction_unexplained(predicted, y),
        unexplained_without_latents=fraction_unexplained(coder.decode(nothing, x), y),
        active_per_token=len(active) / active.num_vectors,
        live=len(labels),
        labelled=len(good),
        labels_by_kind={kind: sum(label.kind == kind for label in good) for kind in kinds},
    )


def write_labels(file: Path, labels: list[LatentLabel]) -> None:
    """One JSON object per live latent: layer, index, description, kind, accepted, score."""
    columns = ("layer", "index", "description", "kind", "accepted", "score")
    rows: list[dict[str, Any]] = []
    for label in labels:
        row = asdict(label)
        rows.append({column: row[column] for column in columns} | {"score": round(label.score, 4)})
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
