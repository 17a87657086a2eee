"""Building the shipped artifacts, stage by stage: tokenizer -> target A, target B -> SAE, transcoder -> manifest.

A stage that has left its artifact folder is done; a stopped build goes on with the stage it was in. The same seed gives
the same artifacts on the same machine and library versions.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from introspect_ray.config import (
    BuildPocketConfig,
    ModelConfig,
    PocketTargetConfig,
    resolved,
)
from introspect_ray.errors import UserError
from introspect_ray.interventions.target import Target
from introspect_ray.models.loading import no_progress_bar
from introspect_ray.pocket.abilities import measure_abilities
from introspect_ray.pocket.sparse import build_sae, build_transcoder
from introspect_ray.pocket.target_training import held_out_loss, train_target
from introspect_ray.pocket.text import Corpus
from introspect_ray.pocket.tokenizer import train_tokenizer
from introspect_ray.pocket.world import World

Progress = Callable[[str, int, int, float], None]
"""(stage, step, steps, loss)"""

MANIFEST = "manifest.json"
TOKENIZER_DOCUMENTS = 20_000


def build_pocket(config: BuildPocketConfig, progress: Progress) -> dict[str, Any]:
    """Build whatever is missing under `config.output`, write the manifest and return it."""
    output, work = Path(config.output), Path(config.work)
    _claim(work, config)
    _check_seed(output, config)
    output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(config.threads)
    world = World(config.seed)
    tokenizer = _tokenizer(world, work / "tokenizer", config)
    for name, shape in (("target_a", config.target_a), ("target_b", config.target_b)):
        _once(output / name, partial(_target, name, shape, tokenizer, work, config, progress))
    target = Target.load(ModelConfig(path=str(output / "target_a")))
    for name, build in (("sae", build_sae), ("transcoder", build_transcoder)):
        _once(
            output / name,
            partial(build, target=target, world=world, config=config.sparse, seed=config.seed, progress=progress),
        )
    manifest = _manifest(output, world, config)
    (output / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def _claim(work: Path, config: BuildPocketConfig) -> None:
    """Refuse to go on with checkpoints of another config."""
    claim = work / "config.json"
    fingerprint = config.model_copy(update={"output": "", "work": "", "threads": 1}).fingerprint()
    if claim.exists() and json.loads(claim.read_text())["fingerprint"] != fingerprint:
        raise UserError(f"{work} holds a build with another config: choose another --work or delete it")
    work.mkdir(parents=True, exist_ok=True)
    claim.write_text(json.dumps({"fingerprint": fingerprint, "config": resolved(config)}, indent=1))


def _check_seed(output: Path, config: BuildPocketConfig) -> None:
    """Refuse to measure one world's models against another world."""
    if not (output / MANIFEST).exists():
        return
    found = json.loads((output / MANIFEST).read_text())["seed"]
    if found != config.seed:
        raise UserError(f"{output} holds models of seed {found}, found seed {config.seed}: choose another --output")


def _once(folder: Path, build: Callable[[Path], object]) -> None:
    """Build into a partial folder and rename it, so that a folder that exists is whole."""
    if folder.exists():
        return
    unfinished = folder.with_name(folder.name + ".partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    build(unfinished)
    unfinished.rename(folder)


def _tokenizer(world: World, folder: Path, config: BuildPocketConfig) -> PreTrainedTokenizerBase:
    def build(unfinished: Path) -> None:
        corpus = Corpus(world, seed=-1)
        texts = (corpus.document().text for _ in range(TOKENIZER_DOCUMENTS))
        train_tokenizer(texts, config.vocabulary_size).save_pretrained(unfinished)

    _once(folder, build)
    return AutoTokenizer.from_pretrained(folder)


def _target(
    name: str,
    shape: PocketTargetConfig,
    tokenizer: PreTrainedTokenizerBase,
    work: Path,
    config: BuildPocketConfig,
    progress: Progress,
    folder: Path,
) -> None:
    """Train one target and store it in bfloat16; its loss and its abilities are measured on what is stored."""
    world = World(config.seed)
    model = train_target(shape, tokenizer, world, work / f"{name}.safetensors", config.seed, partial(progress, name))
    with no_progress_bar():
        model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    loss = held_out_loss(model.float(), tokenizer, world, shape)
    (folder / "training.json").write_text(json.dumps({"loss": round(loss, 4), "steps": shape.steps}) + "\n")


def _manifest(output: Path, world: World, config: BuildPocketConfig) -> dict[str, Any]:
    """Sizes, digests, losses and abilities of everything under `output`."""
    files = sorted(path for path in output.rglob("*") if path.is_file() and path.name != MANIFEST)
    targets = {}
    for name in ("target_a", "target_b"):
        target = Target.load(ModelConfig(path=str(output / name)))
        targets[name] = {
            "architecture": target.model.config.model_type,
            "parameters": sum(parameter.numel() for parameter in target.model.parameters()),
            **json.loads((output / name / "training.json").read_text()),
            "abilities": measure_abilities(target, world, config.seed),
        }
    return {
        "seed": config.seed,
        "targets": targets,
        **{name: json.loads((output / name / "training.json").read_text()) for name in ("sae", "transcoder")},
        "total_bytes": sum(path.stat().st_size for path in files),
        "files": {str(path.relative_to(output)): _describe(path) for path in files},
    }


def _describe(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
