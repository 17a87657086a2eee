"""The training of one coder from a stream of activations: steps, metrics, checkpoints, the coder, its held-out quality.

    parts of the stream -> windows -> shuffled batches -> trainer -> metrics.jsonl, checkpoint.safetensors
    end -> coder in sae-lens format -> loaded again, measured on held-out parts -> training.json

No Ray here: what the stream is read with is the caller's. A checkpoint holds the trainer's state and where its window
begins; batches of that window which were used are drawn again and skipped.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from introspect_ray.config import TrainSaeConfig
from introspect_ray.errors import RunFailed
from introspect_ray.features.batch_topk import SEEDING_POOL, CoderTraining, TranscoderTraining
from introspect_ray.features.places import hook_name
from introspect_ray.features.quality import QualitySums
from introspect_ray.features.sae import load_sae, save_transcoder
from introspect_ray.features.sae_training import SaeTraining
from introspect_ray.features.shuffling import Part, Window, window_batches, windows
from introspect_ray.features.snapshots import Snapshot
from introspect_ray.models.paths import resolve_device
from introspect_ray.training.coder_run import CHECKPOINT_FILE, REPORT_FILE, CoderRun
from introspect_ray.training.metrics import Metrics, MetricsLog

logger = logging.getLogger(__name__)

ReadFrom = Callable[[int, int], Iterator[Part]]
"""(block, row) -> the parts of the stream from there on."""
MEASURED_ROWS = 4096
"""Held-out rows that are measured at a time."""


def train(run: CoderRun, read_from: ReadFrom) -> Iterator[Metrics]:
    """Train to the last step from wherever the run stands; yields what it appends to metrics.jsonl.

    Leaves a checkpoint of the last step, which `export` makes the coder of. Raises RunFailed if too many tokens had
    activations that are not finite.
    """
    config = run.config
    per_window = config.stream.buffer_batches
    training, start, (lost, _) = _resumed(run)
    done = 0 if training is None else training.steps_done
    log = MetricsLog(run.folder, done)
    if done == config.steps:
        return
    first = max(0, done - 1) // per_window
    stream = windows(read_from(*start), per_window * config.batch_size)
    for number, window in enumerate(stream, start=first):
        training = training or _begun(run, window)
        lost += window.lost
        _check_lost(run, lost, (number + 1) * per_window * config.batch_size)
        skip = training.steps_done - number * per_window
        for batch in window_batches(window.columns, config.batch_size, config.seed, number, skip):
            loss = training.step(batch[0], batch[-1])
            step = training.steps_done
            if step % config.trainer.log_every == 0 or step == config.steps:
                measures = asdict(training.measures())
                line = {"step": step, "tokens": step * config.batch_size, "loss": loss, **measures, "lost": lost}
                log.append(line)
                yield line
            if step % config.trainer.checkpoint_every == 0 or step == config.steps:
                _save(run, training, window, lost)
            if step == config.steps:
                return
    raise AssertionError("a stream of texts to train on does not end")


def export(run: CoderRun, held_out: Iterable[Part]) -> dict[str, Any]:
    """Write the coder of the last checkpoint, measure it as it lies there, and write training.json."""
    training, _, lost_before = _resumed(run)
    lost = sum(lost_before)
    assert training is not None and training.steps_done == run.config.steps, "a run is exported after its last step"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if isinstance(training, SaeTraining):
            training.save(folder)
        else:
            assert isinstance(training, TranscoderTraining)
            save_transcoder(training.coder(run.config.layer), folder, _metadata(run))
        for file in sorted(folder.iterdir()):
            run.folder.write(file.name, file.read_bytes())
        sums = QualitySums(load_sae(temporary).to(_device(run)))
        for part in held_out:
            lost += part.lost
            columns = [column.float().to(_device(run)).split(MEASURED_ROWS) for column in part.columns]
            for rows in zip(*columns, strict=True):
                sums.add(rows[0], rows[-1])
            if sums.tokens >= run.config.held_out_tokens:
                break
    report = {
        "run_key": run.run_key,
        "kind": run.kind,
        "layer": run.config.layer,
        "places": list(run.places),
        "steps": run.config.steps,
        "tokens": run.config.steps * run.config.batch_size,
        "lost_tokens": lost,
        "held_out": asdict(sums.quality()),
    }
    run.folder.write(REPORT_FILE, (json.dumps(report, indent=1) + "\n").encode())
    run.folder.remove(CHECKPOINT_FILE)
    return report


def _begun(run: CoderRun, window: Window) -> CoderTraining:
    """A training whose scales and first weights come from the first window."""
    count = max(SEEDING_POOL, run.config.num_latents)
    sample = [column[:count].float() for column in window.columns]
    if isinstance(run.config, TrainSaeConfig):
        return SaeTraining.begun(sample[0], run.training, *_sae_settings(run))
    return TranscoderTraining.begun(sample[0], sample[1], run.training, _device(run))


def _resumed(run: CoderRun) -> tuple[CoderTraining | None, tuple[int, int], tuple[int, int]]:
    """The training of the checkpoint, None if there is none, where in the stream its window begins, and how many
    tokens were lost before that and in the window."""
    try:
        snapshot = Snapshot.from_bytes(run.folder.read(CHECKPOINT_FILE))
    except FileNotFoundError:
        return None, (0, 0), (0, 0)
    numbers = snapshot.numbers
    assert numbers["run_key"] == run.run_key, "prepare lets no other run into the folder"
    start: tuple[int, int] = tuple(numbers["window"])
    lost: tuple[int, int] = tuple(numbers["lost"])
    inner = Snapshot(snapshot.tensors, numbers["training"])
    if isinstance(run.config, TrainSaeConfig):
        return SaeTraining.restored(inner, run.training, *_sae_settings(run)), start, lost
    return TranscoderTraining.restored(inner, run.training, _device(run)), start, lost


def _save(run: CoderRun, training: CoderTraining, window: Window, lost: int) -> None:
    snapshot = training.snapshot()
    numbers = {
        "training": snapshot.numbers,
        "window": [window.block, window.first],
        # Those of the window itself are counted again with it.
        "lost": [lost - window.lost, window.lost],
        "run_key": run.run_key,
    }
    run.folder.write(CHECKPOINT_FILE, Snapshot(snapshot.tensors, numbers).to_bytes())


def _check_lost(run: CoderRun, lost: int, seen: int) -> None:
    if lost > run.config.max_lost_share * (lost + seen):
        raise RunFailed(
            f"activations of {lost} of {lost + seen} tokens are not finite in {run.config.stream.dtype}, more than"
            f" max_lost_share {run.config.max_lost_share:g} allows"
        )


def _sae_settings(run: CoderRun) -> tuple[Any, ...]:
    assert isinstance(run.config, TrainSaeConfig)
    return _metadata(run), run.config.architecture, run.config.sparsity, _device(run)


def _metadata(run: CoderRun) -> dict[str, Any]:
    names = [hook_name(run.config.layer, place) for place in run.places]
    metadata = {"model_name": run.config.target.path, "hook_name": names[0]}
    return metadata | ({"hook_name_out": names[1]} if len(names) > 1 else {})


def _device(run: CoderRun) -> str:
    return str(resolve_device("auto")) if run.config.trainer.num_gpus else "cpu"
