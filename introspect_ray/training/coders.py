"""Training SAEs and transcoders on Ray.

    driver   prepare (no Ray, no model) -> claim folder -> CoderTrainer -> summary
    trainer  reads the stream (data/activations.py, whose actors hold the target), trains, tells the driver

A trainer that dies is started again, and goes on from the newest checkpoint; after a lost driver the same command does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError

from introspect_ray.config import ActorConfig, TrainCoderConfig
from introspect_ray.data.activations import ActivationStream, SharedTexts, StreamPlan
from introspect_ray.data.cluster import connect, is_elsewhere, is_verbose, quiet_stderr
from introspect_ray.data.pool import check_resources, translated
from introspect_ray.errors import RunFailed, UserError
from introspect_ray.training.coder_loop import export, train
from introspect_ray.training.coder_run import CoderRun, Prepared, prepare
from introspect_ray.training.metrics import Metrics, read_metrics

logger = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]
"""Called with steps done, steps in all, and how it goes."""


@dataclass(frozen=True)
class CoderSummary:
    """What a run left in its output folder."""

    output: str
    report: dict[str, Any]
    was_complete: bool

    @property
    def line(self) -> str:
        """One line for people."""
        start = f"{self.output} was already complete" if self.was_complete else f"wrote {self.output}"
        found = self.report["held_out"]
        skip = f" ({found['unexplained_without_latents']:.4f} without latents)" if self.report["kind"] != "sae" else ""
        lost = f"; {self.report['lost_tokens']} tokens were not finite" if self.report["lost_tokens"] else ""
        return (
            f"{start}: {self.report['kind']} of layer {self.report['layer']} after {self.report['steps']} steps; on"
            f" {found['tokens']} held-out tokens {found['unexplained']:.4f} of the variance unexplained{skip},"
            f" {found['active_per_token']:.1f} latents active, {found['dead_share']:.1%} of the latents dead{lost}"
        )


class CoderTrainer:
    """Trains one coder: a thin shell around training/coder_loop.py."""

    def run(self, run: CoderRun, texts: SharedTexts, held_out: SharedTexts) -> Iterator[Metrics | dict[str, Any]]:
        """Lines of metrics as they come, and at the end `{"report": ...}`. Raises UserError or RunFailed alone."""
        try:
            yield from self._run(run, texts, held_out)
        except Exception as error:
            logger.exception("the training of %s ends", run.config.output)
            raise translated(error, "") from None

    def _run(self, run: CoderRun, texts: SharedTexts, held_out: SharedTexts) -> Iterator[Metrics | dict[str, Any]]:
        config = run.config
        common = (config.target, config.layer, run.places, config.stream)
        wanted, ahead = config.steps * config.batch_size, 2 * run.window_bytes
        plan = StreamPlan(*common, len(texts), config.seed)
        stream = ActivationStream(plan, texts, config.actors, run.work, wanted, ahead)
        yield from train(run, stream.parts)
        measured = ActivationStream(StreamPlan(*common, len(held_out), None), held_out, config.actors, run.work)
        yield {"report": export(run, measured.parts())}


def train_coder(config: TrainCoderConfig, progress: Progress) -> CoderSummary:
    """Train the coder that `config` describes, or what is left of it; the same call after any interruption goes on.

    Raises:
        UserError: bad input, before any model loads.
        RunFailed: activations or processes failed too often.
    """
    prepared = prepare(config)
    if (report := prepared.run.report()) is not None:
        return CoderSummary(config.output, report, was_complete=True)
    prepared.claim.write()
    with connect():
        _check_resources(config)
        report = _trained(prepared, progress)
    prepared.run.work.clear()
    return CoderSummary(config.output, report, was_complete=False)


def _check_resources(config: TrainCoderConfig) -> None:
    """Refuse what this machine can never place: the trainer and one actor beside it."""
    check_resources(config.actors)
    if is_elsewhere():
        return
    both = ActorConfig(
        num_cpus=config.actors.num_cpus + config.trainer.num_cpus,
        num_gpus=config.actors.num_gpus + config.trainer.num_gpus,
    )
    there = ray.cluster_resources()
    for key, wanted, resource in (("num_cpus", both.num_cpus, "CPU"), ("num_gpus", both.num_gpus, "GPU")):
        if wanted > there.get(resource, 0):
            raise UserError(
                f"trainer.{key} and actors.{key} need {wanted:g} {resource}s together, but this machine has"
                f" {there.get(resource, 0):g}"
            )


def _trained(prepared: Prepared, progress: Progress) -> dict[str, Any]:
    """Attempts until one ends, or until `max_failures` of them left no newer line of metrics."""
    run, trainer = prepared.run, prepared.run.config.trainer
    arguments = (run, SharedTexts.of(prepared.read(held_out=False)), SharedTexts.of(prepared.read(held_out=True)))
    failures, newest = 0, _steps_logged(run)
    while True:
        trainer_class: Any = ray.remote(num_cpus=trainer.num_cpus, num_gpus=trainer.num_gpus)(CoderTrainer)
        actor = trainer_class.remote()
        try:
            return _watched(run, actor.run.options(num_returns="streaming").remote(*arguments), progress)
        except RayActorError as error:
            now = _steps_logged(run)
            failures, newest = (1, now) if now > newest else (failures + 1, newest)
            if failures > trainer.max_failures:
                raise RunFailed(
                    f"the trainer's process died {failures} times at step {now}; it may need more memory than there"
                    " is; the same command goes on"
                ) from (error if is_verbose() else None)
        except Exception as error:
            raise translated(error, "") from (error if is_verbose() else None)
        finally:
            ray.kill(actor)


def _watched(run: CoderRun, lines: Any, progress: Progress) -> dict[str, Any]:
    while True:
        with quiet_stderr():
            line = ray.get(next(lines))
        if "report" in line:
            return line["report"]
        note = f"loss {line['loss']:.3f}, {line['unexplained']:.3f} unexplained, {line['dead']} dead"
        progress(line["step"], run.config.steps, note)


def _steps_logged(run: CoderRun) -> int:
    lines = read_metrics(run.folder)
    return lines[-1]["step"] if lines else 0
