"""What each Ray Train worker runs to train a simulator: build, resume, step, checkpoint, export.

    all workers   simulator and pairs -> newest whole checkpoint -> steps, checkpoints
    rank 0        metrics, and at the end the simulator itself

What a step does depends on its number, the seed and the weights alone: a run that was interrupted goes on as if it had
not been. Checkpoints, loggers, schedule and sums over workers are those of explainers.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from introspect_ray.config import TrainSimulatorConfig
from introspect_ray.errors import RunFailed, StorageError, UserError
from introspect_ray.features.exemplar_store import open_exemplars
from introspect_ray.simulator.examples import LevelExample, Pair, copied, encode_pair, level_loss, training_pairs
from introspect_ray.simulator.finetuned import FinetunedSimulator
from introspect_ray.training.batches import micro_batches, share, step_indices, step_seed
from introspect_ray.training.checkpoint import Checkpoints, CheckpointStore, Tell, TrainState
from introspect_ray.training.loggers import Loggers
from introspect_ray.training.schedule import learning_rate, make_optimizer
from introspect_ray.training.simulator_run import SimulatorRun, chosen_descriptions, latent_split
from introspect_ray.training.trainable import Trainable
from introspect_ray.training.workers import Workers

logger = logging.getLogger(__name__)


def train_simulator_loop(settings: dict[str, Any]) -> None:
    """Ray Train's entry on each worker. Failures that a retry would only repeat are recorded, not raised."""
    import ray.train.torch

    context, device = ray.train.get_context(), ray.train.torch.get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)  # All workers of a node see all of its GPUs.
    workers = Workers(context.get_world_rank(), context.get_world_size())
    run = SimulatorRun.from_json(settings)
    torch.set_num_threads(max(1, int(run.config.trainer.cpus_per_worker)))
    try:
        fit(run, workers, tell=lambda line: settings["notices"].add.remote(line))
    except StorageError:
        raise  # Ray ends the group, and another one tries
    except (UserError, RunFailed) as error:
        if workers.rank == 0:
            run.record({"failure": str(error), "by_user": isinstance(error, UserError)})


def fit(run: SimulatorRun, workers: Workers, tell: Tell = logger.warning) -> dict[str, Any]:
    """Train from the newest checkpoint, or the start, to the end, and export the simulator; returns the results.

    Raises:
        StorageError: on one worker or more; trying again goes on where this attempt came to.
        UserError: the model does not load, or exemplars or descriptions cannot be read.
        RunFailed: loss or gradient became NaN or infinite, or another worker could not start.
    """
    if workers.agree(int(workers.rank == 0 and run.is_complete()), workers.device):
        return run.results()  # for whoever takes the place of a worker that died when all was done
    simulator, strata = _build_together(run, workers)
    stepper = SimulatorStepper(simulator, strata, run.config, workers)
    optimizer = make_optimizer(stepper.trainable.own.values(), run.config.optimization)
    store = CheckpointStore(run.checkpoints, run.run_key, run.config.trainer.keep_checkpoints)
    checkpoints = Checkpoints(store, stepper.trainable, optimizer, tell)
    state = checkpoints.restore()
    if state.step > 0 and workers.rank == 0:
        tell(f"goes on from the checkpoint of step {state.step} with {workers.size} worker(s)")
    with Loggers(run, state.step) if workers.rank == 0 else nullcontext() as log:
        results = _steps(stepper, optimizer, state, checkpoints, log)
    if workers.rank == 0:
        run.record(results)
        simulator.model.eval()
        simulator.save(run.config.output)
        try:
            store.clear()
        except Exception as error:  # every backend has its own; the simulator is there
            tell(f"checkpoints in {run.checkpoints.url} could not be removed: {error}")
    return results


def _build_together(run: SimulatorRun, workers: Workers) -> tuple[FinetunedSimulator, tuple[list[Pair], list[Pair]]]:
    """`build` on every worker. If that fails on one, all fail here and none waits."""
    error: UserError | None = None
    try:
        simulator, strata = build(run.config)
    except StorageError:
        raise  # others wait for this worker until Ray ends the group
    except UserError as found:
        error = found
    everyone = workers.all_true(error is None, workers.device)
    if error is not None:
        raise error
    if not everyone:
        raise RunFailed("another worker could not load the simulator or its examples")
    return simulator, strata


def build(config: TrainSimulatorConfig) -> tuple[FinetunedSimulator, tuple[list[Pair], list[Pair]]]:
    """The untrained simulator, all its weights set free, and its pairs by stratum."""
    model = config.model
    if model.device == "auto" and config.trainer.gpus_per_worker == 0:
        model = model.model_copy(update={"device": "cpu"})  # lent no GPU, though the process may see one
    store = open_exemplars(config.exemplars)
    simulator = FinetunedSimulator.create(model, latent_split(config, store))
    simulator.model.requires_grad_(True).train()
    descriptions = chosen_descriptions(config, store)
    strata = training_pairs(
        [store.read(latent, "train") for _, latent in descriptions], descriptions, config.firing_share
    )
    if not any(strata):
        raise UserError(f"exemplars {config.exemplars} have no windows of training texts for any described latent")
    return simulator, strata


class SimulatorStepper:
    """Takes optimizer steps."""

    def __init__(
        self,
        simulator: FinetunedSimulator,
        strata: tuple[list[Pair], list[Pair]],
        config: TrainSimulatorConfig,
        workers: Workers,
    ):
        self.simulator = simulator
        self.config = config
        self.workers = workers
        self.trainable = Trainable(simulator, workers)
        kept = [
            (pairs, part) for pairs, part in zip(strata, (config.firing_share, 1 - config.firing_share), strict=True)
        ]
        self._pairs = [pair for pairs, _ in kept for pair in pairs]
        self._sizes = [len(pairs) for pairs, _ in kept if pairs]
        self._weights = [part for pairs, part in kept if pairs]

    def step(self, number: int, optimizer: torch.optim.AdamW) -> tuple[float, int, float]:
        """Do optimizer step `number`, counted from 0: loss, tokens, unclipped gradient norm.

        The loss is the sum over all examples over `batch_size`: copies, while there are any, come on top.

        Raises:
            RunFailed: loss or gradient is not finite, on all workers alike; the latents of the batch are named.
        """
        settings = self.config.optimization
        chosen = self.examples(number)
        lengths = [len(example) for example in chosen]
        torch.manual_seed(step_seed(number, self.config.seed, self.workers.rank))
        self.trainable.clear_gradients()
        total = torch.zeros(1, device=self.simulator.device)
        mine = share(range(len(chosen)), lengths, self.workers.rank, self.workers.size)
        for rows in micro_batches([[index] for index in mine], lengths, self.config.trainer.micro_batch_tokens):
            total += self._backward([chosen[index] for row in rows for index in row], settings.batch_size)
        loss = float(self.trainable.sum_gradients(total))
        grad_norm = self.trainable.clip_gradients(settings.max_grad_norm)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise RunFailed(
                f"step {number + 1}: loss is {loss:g} and gradient norm {grad_norm:g}, expected finite numbers"
                f" (optimization.learning_rate {settings.learning_rate:g} too high?)"
            )
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(number, settings)
        optimizer.step()
        return loss, sum(lengths), grad_norm

    def examples(self, number: int) -> list[LevelExample]:
        """All workers' examples of a step."""
        config, size, steps = self.config, self.config.optimization.batch_size, self.config.optimization.steps
        first = round(config.copy_first * steps)
        if number < first:
            return self._copies(number, size, 1.0)
        chosen = step_indices(number - first, size, self._sizes, config.seed, weights=self._weights)
        power = weight_power(number - first, steps - first, config.balanced_share)
        examples = [encode_pair(self.simulator, self._pairs[index]) for index in chosen]
        copies = self._copies(number, round(config.copy_share * size), 1 - power) if power < 1 else []
        return [*(replace(example, weight=example.weight**power) for example in examples), *copies]

    def _copies(self, number: int, count: int, weight: float) -> list[LevelExample]:
        """Made-up examples of one step, see `copied`."""
        draw = random.Random(f"copies {self.config.seed} {number}")
        pairs = [copied(self._pairs[draw.randrange(len(self._pairs))], draw) for _ in range(count)]
        return [replace(encode_pair(self.simulator, pair), weight=weight) for pair in pairs]

    def _backward(self, batch: Sequence[LevelExample], count: int) -> torch.Tensor:
        """Add one micro-batch to the gradient of the mean over `count` examples; returns its part of that mean."""
        half = self.config.trainer.compute_dtype == "bfloat16"
        with torch.autocast(self.simulator.device.type, torch.bfloat16) if half else nullcontext():
            loss = level_loss(self.simulator, batch) / count
        loss.backward()
        return loss.detach()


def weight_power(step: int, steps: int, balanced_share: float) -> float:
    """Power of the importance weights in a step (counted from 0): from 0, all equal, up to 1, the natural ones."""
    rising = balanced_share * steps
    return min(1.0, step / rising) if rising else 1.0


def _steps(
    stepper: SimulatorStepper,
    optimizer: torch.optim.AdamW,
    state: TrainState,
    checkpoints: Checkpoints,
    log: Loggers | None,
) -> dict[str, Any]:
    """All steps that are left, and a checkpoint of the last one, so that an export that fails costs no step.

    Returns the last line of metrics.
    """
    config = stepper.config
    steps = config.optimization.steps
    started, before = time.monotonic(), state.tokens
    while state.step < steps:
        loss, tokens, grad_norm = stepper.step(state.step, optimizer)
        state.step += 1
        state.tokens += tokens
        # Here a window's loss is summed over steps: every step has equally many examples.
        state.window_loss += loss
        state.window_tokens += 1
        is_last = state.step == steps
        if state.step % config.trainer.log_every == 0 or is_last:
            now = time.monotonic()
            state.metrics = {
                "step": state.step,
                "loss": state.window_loss / state.window_tokens,
                "lr": learning_rate(state.step - 1, config.optimization),
                "tokens": state.tokens,
                "grad_norm": grad_norm,
                "tokens_per_second": (state.tokens - before) / max(now - started, 1e-9),
            }
            state.window_loss, state.window_tokens = 0.0, 0
            started, before = now, state.tokens
            if log is not None:
                log.append(state.metrics)
        if is_last or state.step % config.trainer.checkpoint_every == 0:
            checkpoints.start(state)
        checkpoints.settle(wait=is_last)
    return state.metrics
