"""What each Ray Train worker runs: build, resume, step, checkpoint, export.

    all workers   build explainer and examples -> agree on the newest whole checkpoint
                  -> steps, evaluations, checkpoints
    rank 0        metrics, and at the end the explainer itself, as it was at its best evaluation if there were any,
                  sharded weights gathered one by one

Checkpoints are ours, not Ray's, so that resuming is one path whatever died (a worker, the driver, the cluster).
`ray.train.report`, a barrier that costs up to a controller poll, is not called: what came of a run is in its folder.
"""

from __future__ import annotations

import logging
import math
from contextlib import nullcontext
from typing import Any

import torch

from introspect_ray.config import ExplainerConfig, TrainConfig
from introspect_ray.errors import RunFailed, StorageError, UserError
from introspect_ray.explainer.model import Explainer
from introspect_ray.training.checkpoint import Checkpoints, CheckpointStore, Tell, TrainState
from introspect_ray.training.compiling import compile_layers
from introspect_ray.training.examples import Examples, load_examples, scratch_folder
from introspect_ray.training.loggers import Loggers
from introspect_ray.training.model_card import readme
from introspect_ray.training.run import TrainingRun
from introspect_ray.training.schedule import learning_rate, make_optimizer
from introspect_ray.training.sharding import checkpoint_activations, streamed_explainer, whole_parameters
from introspect_ray.training.speed import Speed
from introspect_ray.training.step import Stepper, StepResult
from introspect_ray.training.validation import Evaluator, HeldOut, load_held_out
from introspect_ray.training.workers import Workers

logger = logging.getLogger(__name__)


def train_loop(settings: dict[str, Any]) -> None:
    """Ray Train's entry on each worker. Failures that a retry would only repeat are recorded, not raised."""
    import ray.train.torch

    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)  # All workers of a node see all of its GPUs.
    workers = Workers(context.get_world_rank(), context.get_world_size())
    run = TrainingRun.from_json(settings)
    torch.set_num_threads(max(1, int(run.config.trainer.cpus_per_worker)))
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # it costs time
    fit_or_record(run, workers, tell=lambda line: settings["notices"].add.remote(line))


def fit_or_record(run: TrainingRun, workers: Workers, tell: Tell) -> None:
    """`fit`; a failure that a retry would only repeat is recorded by rank 0 and raised nowhere.

    Raises:
        StorageError: this worker cannot reach the storage. Ray ends the group, in which others may wait for this
            worker, and another one tries.
    """
    try:
        fit(run, workers, tell)
    except StorageError:
        raise
    except (UserError, RunFailed) as error:
        if workers.rank == 0:
            run.record({"failure": str(error), "by_user": isinstance(error, UserError)})


def fit(run: TrainingRun, workers: Workers, tell: Tell = logger.warning) -> dict[str, Any]:
    """Train from the newest checkpoint, or the start, to the end, and export the explainer; returns the results.

    Args:
        tell: called on any worker with what the user should hear while the run goes on.

    Raises:
        StorageError: on one worker or more; trying again goes on where this attempt came to.
        UserError: a record does not fit the explainer, or a model does not load.
        RunFailed: loss or gradient became NaN or infinite, or another worker could not start.
    """
    # Whoever takes the place of a worker that died when all was done has nothing left to do.
    if workers.agree(int(workers.rank == 0 and run.is_complete()), workers.device):
        return run.results()
    explainer, examples, held_out = _build_together(run, workers, tell)
    stepper = Stepper(explainer, examples, run.config, workers)
    evaluator = Evaluator(explainer, held_out, run.config, workers)
    optimizer = make_optimizer(stepper.trainable.own.values(), run.config.optimization)
    store = CheckpointStore(run.checkpoints, run.run_key, run.config.trainer.keep_checkpoints)
    checkpoints = Checkpoints(store, stepper.trainable, optimizer, tell)
    state = checkpoints.restore()
    if state.step > 0 and workers.rank == 0:
        tell(f"goes on from the checkpoint of step {state.step} with {workers.size} worker(s)")
    try:
        with Loggers(run, state.step) if workers.rank == 0 else nullcontext() as log:
            results = _steps(stepper, evaluator, optimizer, state, checkpoints, log)
    except RunFailed:
        examples.remove()
        raise
    if state.best_step:
        results = results | _back_to_best(state, checkpoints, run.config, tell if workers.rank == 0 else None)
    weights = whole_parameters(explainer) if stepper.trainable.is_sharded else None
    if workers.rank == 0:
        run.record(results)
        explainer.save(run.config.output, weights, readme(explainer.card, run.account(results)))
        try:
            store.clear()
        except Exception as error:  # every backend has its own; the explainer is there
            tell(f"checkpoints in {run.checkpoints.url} could not be removed: {error}")
    else:
        for _ in weights or ():
            pass  # gathering takes all workers
    examples.remove()
    return results


def _back_to_best(
    state: TrainState, checkpoints: Checkpoints, config: TrainConfig, tell: Tell | None
) -> dict[str, Any]:
    """Take the weights of the best evaluation whose checkpoint is there, and say which they are and what they scored.

    If its own was lost, or could not be written, the best before it is taken, or the last step if that scored more.
    """
    metric = config.evaluation.metric
    exported, scores = state.step, state.metrics["validation"]
    if state.best_step < state.step:
        last = scores.get(metric)
        found = checkpoints.restore_best(state.best_step, metric, -math.inf if last is None else last)
        if found.step:
            exported, scores = found.step, found.best_scores
        if exported != state.best_step and tell is not None:
            tell(f"the checkpoint of the best step, {state.best_step}, is not there: step {exported} is exported")
    return {
        "exported_step": exported,
        "exported_scores": scores,
        "best_step": state.best_step,
        "best": state.best_scores,
        "stopped_early": state.step < config.optimization.steps,
    }


def _build_together(run: TrainingRun, workers: Workers, tell: Tell) -> tuple[Explainer, Examples, list[HeldOut]]:
    """`build` on every worker, and what evaluations answer. If that fails on one, all fail here and none waits."""
    error: UserError | None = None
    try:
        explainer, examples = build(run)
        held_out = load_held_out(explainer, run.config)
    except StorageError:
        raise  # the others are not told: Ray ends them, and that another group starts needs one who fails
    except UserError as found:
        error = found
    everyone = workers.all_true(error is None, workers.device)
    if error is not None:
        if workers.rank > 0:
            tell(f"worker {workers.rank}: {error}")  # rank 0, which speaks for all, does not know why
        raise error
    if not everyone:
        raise RunFailed("another worker could not load the explainer or its examples")
    return explainer, examples, held_out


def build(run: TrainingRun) -> tuple[Explainer, Examples]:
    """The untrained explainer with the parameters that the method trains set free, and its examples."""
    config = run.config.model_copy(update={"explainer": _placed(run.config)})
    if config.trainer.sharding == "fsdp2" or config.method == "qlora":
        explainer = streamed_explainer(config, run.target)
    else:
        explainer = Explainer.create(config.explainer, run.target, config.seed)
        if config.method == "lora":
            explainer.add_adapter(config.lora, config.seed)
        else:
            explainer.model.requires_grad_(True)
    if config.trainer.activation_checkpointing:
        checkpoint_activations(explainer)
    explainer.projections.requires_grad_(True)
    explainer.train()
    if config.trainer.compile:
        compile_layers(explainer)
    examples = load_examples(explainer, config.datasets, scratch_folder(run.run_key))
    return explainer, examples


def _placed(config: TrainConfig) -> ExplainerConfig:
    """The explainer's config; a worker that was lent no GPU takes none, though the process may see one."""
    model = config.explainer.model
    if model.device != "auto" or config.trainer.gpus_per_worker > 0:
        return config.explainer
    return config.explainer.model_copy(update={"model": model.model_copy(update={"device": "cpu"})})


def _steps(
    stepper: Stepper,
    evaluator: Evaluator,
    optimizer: torch.optim.AdamW,
    state: TrainState,
    checkpoints: Checkpoints,
    log: Loggers | None,
) -> dict[str, Any]:
    """All steps that are left, and a checkpoint of the last one, so that an export that fails costs no step.

    Returns the last line of metrics, rounding differences and timings apart the same for any history of interruptions.
    """
    config = stepper.config
    steps = config.optimization.steps
    speed = Speed(stepper.explainer, stepper.workers.size)
    speed.start(state.tokens)
    while state.step < steps and not evaluator.is_over(state):
        result = stepper.step(state.step, optimizer)
        _add(state, result)
        if state.step % config.trainer.log_every == 0 or state.step == steps or evaluator.is_due(state.step):
            metrics = _metrics(state, result, config) | speed.metrics(state.tokens)
            if evaluator.is_due(state.step):
                metrics |= evaluator.evaluate(state)
            state.metrics = metrics
            speed.start(state.tokens)
            if log is not None:
                log.append(metrics)
        is_last = evaluator.is_over(state) or state.step == steps
        # The best step's checkpoint is what is exported in the end.
        if is_last or state.step % config.trainer.checkpoint_every == 0 or state.step == state.best_step:
            checkpoints.start(state)
        checkpoints.settle(wait=is_last)
    return state.metrics


def _add(state: TrainState, result: StepResult) -> None:
    state.step += 1
    state.tokens += result.tokens
    state.window_loss += result.loss_sum
    state.window_tokens += result.loss_tokens


def _metrics(state: TrainState, result: StepResult, config: TrainConfig) -> dict[str, Any]:
    """One line of metrics; the loss is the token mean since the line before, which starts anew."""
    metrics = {
        "step": state.step,
        "loss": state.window_loss / state.window_tokens,
        "lr": learning_rate(state.step - 1, config.optimization),
        "tokens": state.tokens,
        "grad_norm": result.grad_norm,
    }
    state.window_loss, state.window_tokens = 0.0, 0
    return metrics
