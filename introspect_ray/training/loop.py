"""What each Ray Train worker runs: build, resume, step, checkpoint, export.

    all workers   build explainer and examples -> agree on the newest whole checkpoint -> steps, checkpoints
    rank 0        metrics.jsonl, and at the end the explainer itself, sharded weights gathered one by one

Checkpoints are ours, not Ray's, so that resuming is one path whatever died (a worker, the driver, the cluster).
`ray.train.report`, a barrier that costs up to a controller poll, is not called: what came of a run is in its folder.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import torch

from introspect_ray.config import ExplainerConfig, TrainConfig
from introspect_ray.errors import RunFailed, UserError
from introspect_ray.explainer.model import Explainer
from introspect_ray.training.checkpoint import Checkpoints, CheckpointStore, Tell, TrainState
from introspect_ray.training.compiling import compile_layers
from introspect_ray.training.examples import Examples, load_examples, scratch_folder
from introspect_ray.training.metrics import MetricsLog
from introspect_ray.training.run import TrainingRun
from introspect_ray.training.schedule import learning_rate, make_optimizer
from introspect_ray.training.sharding import checkpoint_activations, streamed_explainer, whole_parameters
from introspect_ray.training.step import Stepper, StepResult
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
    try:
        fit(run, workers, tell=lambda line: settings["notices"].add.remote(line))
    except (UserError, RunFailed) as error:
        if workers.rank == 0:
            run.record({"failure": str(error), "by_user": isinstance(error, UserError)})


def fit(run: TrainingRun, workers: Workers, tell: Tell = logger.warning) -> dict[str, Any]:
    """Train from the newest checkpoint, or the start, to the end, and export the explainer; returns the results.

    Args:
        tell: called on any worker with what the user should hear while the run goes on.

    Raises:
        UserError: a record does not fit the explainer, or a model does not load.
        RunFailed: loss or gradient became NaN or infinite, or another worker could not start.
    """
    explainer, examples = _build_together(run, workers)
    stepper = Stepper(explainer, examples, run.config, workers)
    optimizer = make_optimizer(stepper.trainable.own.values(), run.config.optimization)
    store = CheckpointStore(run.checkpoints, run.run_key, run.config.trainer.keep_checkpoints)
    checkpoints = Checkpoints(store, stepper.trainable, optimizer, tell)
    state = checkpoints.restore()
    if state.step > 0 and workers.rank == 0:
        tell(f"goes on from the checkpoint of step {state.step} with {workers.size} worker(s)")
    log = MetricsLog(run.folder, state.step) if workers.rank == 0 else None
    try:
        results = _steps(stepper, optimizer, state, checkpoints, log)
    except RunFailed:
        examples.remove()
        raise
    weights = whole_parameters(explainer) if stepper.trainable.is_sharded else None
    if workers.rank == 0:
        run.record(results)
        explainer.save(run.config.output, weights)
        store.clear()
    else:
        for _ in weights or ():
            pass  # gathering takes all workers
    examples.remove()
    return results


def _build_together(run: TrainingRun, workers: Workers) -> tuple[Explainer, Examples]:
    """`build` on every worker. If it fails on one, all fail here and none is left waiting for a message."""
    error: UserError | None = None
    try:
        explainer, examples = build(run)
    except UserError as found:
        error = found
    device = torch.device("cpu") if error or workers.size == 1 else explainer.device
    everyone = workers.all_true(error is None, device)
    if error is not None:
        raise error
    if not everyone:
        raise RunFailed("another worker could not load the explainer or its examples")
    return explainer, examples


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
    stepper: Stepper, optimizer: torch.optim.AdamW, state: TrainState, checkpoints: Checkpoints, log: MetricsLog | None
) -> dict[str, Any]:
    """All steps that are left; returns the last line of metrics, rounding differences and timings apart the same for
    any history of interruptions."""
    config = stepper.config
    steps = config.optimization.steps
    started, tokens_before = time.monotonic(), state.tokens
    last: dict[str, Any] = {}
    for number in range(state.step, steps):
        result = stepper.step(number, optimizer)
        _add(state, result)
        if state.step % config.trainer.log_every == 0 or state.step == steps:
            speed = (state.tokens - tokens_before) / (time.monotonic() - started)
            last = _metrics(state, result, config, speed)
            started, tokens_before = time.monotonic(), state.tokens
            if log is not None:
                log.append(last)
        if state.step % config.trainer.checkpoint_every == 0 and state.step < steps:
            checkpoints.start(state)
        checkpoints.settle(wait=state.step == steps)
    return last


def _add(state: TrainState, result: StepResult) -> None:
    state.step += 1
    state.tokens += result.tokens
    state.window_loss += result.loss_sum
    state.window_tokens += result.loss_tokens


def _metrics(state: TrainState, result: StepResult, config: TrainConfig, speed: float) -> dict[str, Any]:
    """One line of metrics; the loss is the token mean since the line before, which starts anew."""
    metrics = {
        "step": state.step,
        "loss": state.window_loss / state.window_tokens,
        "lr": learning_rate(state.step - 1, config.optimization),
        "tokens": state.tokens,
        "tokens_per_second": round(speed, 1),
        "grad_norm": result.grad_norm,
    }
    state.window_loss, state.window_tokens = 0.0, 0
    return metrics
