"""Training a simulator on Ray Train, from a driver that only watches; workers and recovery are those of train.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from introspect_ray.config import TrainSimulatorConfig
from introspect_ray.training.metrics import Metrics
from introspect_ray.training.simulator_loop import train_simulator_loop
from introspect_ray.training.simulator_run import prepare
from introspect_ray.training.train import Progress, run_workers


@dataclass(frozen=True)
class SimulatorSummary:
    """What a run left in its output folder."""

    output: str
    num_latents: int
    results: dict[str, Any]
    """The last line of metrics.jsonl."""
    was_complete: bool

    @property
    def line(self) -> str:
        """One line for people."""
        start = f"{self.output} was already complete" if self.was_complete else f"wrote {self.output}"
        return (
            f"{start}: simulator after {self.results['step']} steps on {self.num_latents} latents, loss"
            f" {self.results['loss']:.4f} nats per token at the natural base rate"
        )


def train_simulator(config: TrainSimulatorConfig, progress: Progress) -> SimulatorSummary:
    """Train the simulator that `config` describes, or what is left of it; the same call after any interruption goes on.

    Raises:
        UserError: bad input, before any model loads.
        RunFailed: the run broke in a way that starting over would only repeat, or workers failed too often.
    """
    run = prepare(config)
    if run.is_complete():
        return SimulatorSummary(config.output, run.num_latents, run.results(), was_complete=True)
    run.record({})
    results = run_workers(run, train_simulator_loop, progress, _note)
    return SimulatorSummary(config.output, run.num_latents, results, was_complete=False)


def _note(lines: Sequence[Metrics]) -> str:
    newest = lines[-1]
    return f"loss {newest['loss']:.4f}, {newest['tokens_per_second']:,.0f} tokens/s"
