"""Training of SAEs by sae-lens' own trainer, one batch at a time, on vectors from anywhere.

B vectors of a batch, D width, F latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from introspect_ray.features.batch_topk import (
    INITIAL_NORM,
    THRESHOLD_RATE,
    BatchTopKConfig,
    Measures,
    Progress,
    shuffled_batches,
    spread_rows,
    unit_scale,
)
from introspect_ray.features.coder import fraction_unexplained
from introspect_ray.features.snapshots import Snapshot, optimizer_snapshot, restore_optimizer, with_prefix

SaeArchitecture = Literal["batchtopk", "topk", "jumprelu", "standard"]


class SaeTraining:
    """An SAE being trained; vectors are brought to unit scale, which `save` folds into the weights."""

    def __init__(
        self,
        width: int,
        scale: float,
        config: BatchTopKConfig,
        metadata: Mapping[str, Any],
        architecture: SaeArchitecture = "batchtopk",
        sparsity: float = 1.0,
        device: str = "cpu",
    ):
        """Weights as sae-lens draws them. `metadata` must hold `hook_name`; `sparsity` weighs the penalty on latents,
        where there is one (jumprelu, standard)."""
        from sae_lens import LoggingConfig, SAETrainer
        from sae_lens.config import SAETrainerConfig

        self.scale = scale
        self.config = config
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            self.sae = _new_sae(architecture, width, config, metadata, sparsity).to(device)
        self._trainer = SAETrainer(
            SAETrainerConfig(
                total_training_samples=config.steps * config.batch_size,
                train_batch_size_samples=config.batch_size,
                lr=config.learning_rate,
                lr_end=config.learning_rate / 10,
                lr_warm_up_steps=config.warmup,
                lr_decay_steps=config.decay,
                dead_feature_window=config.dead_after,
                device=device,
                logger=LoggingConfig(log_to_wandb=False),
            ),
            self.sae,
            iter(()),
        )
        self._last: Any = None

    @classmethod
    def begun(cls, x: Float[Tensor, "N D"], config: BatchTopKConfig, *args: Any, **settings: Any) -> SaeTraining:
        """Scale and first weights from a sample of what it will be trained on: latents begin as spread rows."""
        training = cls(x.shape[1], unit_scale(x), config, *args, **settings)
        with torch.no_grad():
            training.sae.b_dec.copy_(x.mean(0) * training.scale)
            rows = spread_rows(x, config.num_latents, config.seed)
            training.sae.W_dec.copy_(INITIAL_NORM * nn.functional.normalize(x[rows] - x.mean(0), dim=-1))
            training.sae.W_enc.copy_(training.sae.W_dec.T)
        return training

    @property
    def steps_done(self) -> int:
        return self._trainer.n_training_steps

    def step(self, x: Float[Tensor, "B D"], y: Float[Tensor, "B D"] | None = None) -> float:  # noqa: ARG002 - is x
        """One step of sae-lens' trainer. Its `fit` draws a progress bar, so its steps are taken one by one."""
        self._trainer.maybe_reset_sparsity()
        self._last = self._trainer.step(x * self.scale)
        self._trainer.n_training_steps += 1
        return self._last.loss.item()

    def measures(self) -> Measures:
        assert self._last is not None, "no step was taken"
        latents = self._last.feature_acts.detach()
        return Measures(
            unexplained=fraction_unexplained(self._last.sae_out.detach(), self._last.sae_in.detach()),
            active=(latents != 0).sum().item() / len(latents),
            dead=int(self._trainer.dead_neurons.sum()),
        )

    def snapshot(self) -> Snapshot:
        trainer, moments = self._trainer, optimizer_snapshot(self._trainer.optimizer)
        tensors = with_prefix("model.", self.sae.state_dict()) | with_prefix("optimizer.", moments.tensors)
        tensors |= {"fired": trainer.act_freq_scores, "silent": trainer.n_forward_passes_since_fired}
        numbers = {
            "scale": self.scale,
            "width": self.sae.cfg.d_in,
            "optimizer": moments.numbers,
            "schedule": _numbers(trainer.lr_scheduler.state_dict()),
            "coefficients": {name: one.state_dict() for name, one in trainer.coefficient_schedulers.items()},
            "counts": {name: getattr(trainer, name) for name in _COUNTS},
        }
        return Snapshot(tensors, numbers)

    @classmethod
    def restored(cls, snapshot: Snapshot, config: BatchTopKConfig, *args: Any, **settings: Any) -> SaeTraining:
        """The training that `snapshot` was taken of."""
        numbers = snapshot.numbers
        training = cls(numbers["width"], numbers["scale"], config, *args, **settings)
        trainer, device = training._trainer, training.sae.device
        training.sae.load_state_dict(snapshot.part("model."))
        trainer.lr_scheduler.load_state_dict(numbers["schedule"])
        for name, state in numbers["coefficients"].items():
            trainer.coefficient_schedulers[name].load_state_dict(state)
        restore_optimizer(trainer.optimizer, snapshot.part("optimizer."), numbers["optimizer"])
        trainer.act_freq_scores = snapshot.tensors["fired"].to(device)
        trainer.n_forward_passes_since_fired = snapshot.tensors["silent"].to(device)
        for name, count in numbers["counts"].items():
            setattr(trainer, name, count)
        return training

    def save(self, folder: Path) -> None:
        """Write the trained SAE as sae-lens does, for vectors as they are; not to be trained on afterwards."""
        self.sae.fold_activation_norm_scaling_factor(self.scale)
        self._trainer.set_final_sae_metadata()
        self.sae.to("cpu").save_inference_model(folder)


_COUNTS = ("n_training_steps", "n_training_samples", "n_frac_active_samples", "started_fine_tuning")


def _new_sae(
    architecture: SaeArchitecture, width: int, config: BatchTopKConfig, metadata: Mapping[str, Any], sparsity: float
) -> Any:
    import sae_lens
    from sae_lens.saes.sae import SAEMetadata

    common = {"d_in": width, "d_sae": config.num_latents, "metadata": SAEMetadata(**metadata)}
    if architecture == "batchtopk":
        batch_topk = sae_lens.BatchTopKTrainingSAEConfig(
            **common, k=config.num_active, topk_threshold_lr=THRESHOLD_RATE
        )
        return sae_lens.BatchTopKTrainingSAE(batch_topk)
    if architecture == "topk":
        return sae_lens.TopKTrainingSAE(sae_lens.TopKTrainingSAEConfig(**common, k=config.num_active))
    if architecture == "jumprelu":
        jumprelu = sae_lens.JumpReLUTrainingSAEConfig(
            **common,
            l0_coefficient=sparsity,
            l0_warm_up_steps=config.warmup,
            jumprelu_sparsity_loss_mode="tanh",
            jumprelu_bandwidth=2.0,
            pre_act_loss_coefficient=3e-6,
        )
        return sae_lens.JumpReLUTrainingSAE(jumprelu)
    standard = sae_lens.StandardTrainingSAEConfig(**common, l1_coefficient=sparsity, l1_warm_up_steps=config.warmup)
    return sae_lens.StandardTrainingSAE(standard)


def _numbers(state: dict[str, Any]) -> dict[str, Any]:
    """A scheduler's state without what it cannot say as JSON and does not need: the schedulers it is made of are new
    ones of the same making."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items() if not callable(inner)}
        if isinstance(value, list | tuple):
            return [plain(inner) for inner in value]
        return value

    return plain(state)


def train_sae(
    x: Float[Tensor, "N D"], config: BatchTopKConfig, metadata: dict[str, Any], folder: Path, progress: Progress
) -> None:
    """Train an SAE on the rows of `x`, all of which are in memory, and write it to `folder`."""
    training = SaeTraining.begun(x, config, metadata)
    for step, rows in enumerate(shuffled_batches(len(x), config)):
        progress(step + 1, training.step(x[rows]))
    training.save(folder)
