"""Training of sparse coders with BatchTopK: the largest k x batch size latents of a whole batch stay.

SAEs are trained by sae-lens' own trainer. It has none for transcoders, so skip transcoders (P2 section 3) are trained
here the same way. Either ends as a JumpReLU coder whose one threshold is the running minimum of what stayed in a batch.
B vectors of a batch, D width, F latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from introspect_ray.features.coder import SparseCoder

Progress = Callable[[int, float], None]
"""Called after every step with the number of steps done and the loss."""

SEEDING_POOL = 50_000
"""Rows from which the first directions are drawn."""

INITIAL_NORM = 1.0
"""Norm of the first encoder and decoder rows: so large that a few steps do not turn them away from their rows."""

THRESHOLD_RATE = 0.01
"""Weight of a new batch in the running threshold (sae-lens' default, so that both trainers agree)."""


@dataclass(frozen=True)
class BatchTopKConfig:
    """How to train one coder. The learning rate rises over `steps` / 20, and falls to a tenth over the last quarter."""

    num_latents: int
    num_active: int
    """Mean number of latents that stay per vector."""
    steps: int
    batch_size: int
    learning_rate: float
    dead_after: int
    """Steps without firing after which a latent counts as dead, and learns to fill what the others leave over."""
    seed: int

    @property
    def warmup(self) -> int:
        return max(1, self.steps // 20)

    @property
    def decay(self) -> int:
        return max(1, self.steps // 4)


def unit_scale(x: Float[Tensor, "N D"]) -> float:
    """Factor that gives the rows a mean norm of sqrt(D), at which the learning rates are meant."""
    return (x.shape[-1] ** 0.5 / x.norm(dim=-1).mean()).item()


def shuffled_batches(num_rows: int, config: BatchTopKConfig) -> Iterator[Tensor]:
    """Row numbers of `config.steps` batches; every row once before any row twice."""
    generator = torch.Generator().manual_seed(config.seed)
    waiting = torch.empty(0, dtype=torch.long)
    for _ in range(config.steps):
        while len(waiting) < config.batch_size:
            waiting = torch.cat([waiting, torch.randperm(num_rows, generator=generator)])
        yield waiting[: config.batch_size]
        waiting = waiting[config.batch_size :]


def spread_rows(x: Float[Tensor, "N D"], count: int, seed: int) -> Int[Tensor, " F"]:
    """`count` rows of `x` that point in many directions: each is drawn in proportion to 1 - cosine to the nearest one.

    k-means++ seeding. Latents that begin as such rows are few of them dead or twins, which random ones often are.
    Directions are those from the mean row. Should all rows be taken or equal, the rest are any rows.
    """
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randperm(len(x), generator=generator)[:SEEDING_POOL]
    directions = nn.functional.normalize(x[pool] - x.mean(0), dim=-1)
    distance = torch.ones(len(pool))
    chosen: list[Tensor] = []
    for _ in range(count):
        weights = distance if distance.sum() > 0 else torch.ones(len(pool))
        row = torch.multinomial(weights, 1, generator=generator)
        chosen.append(row)
        distance = torch.minimum(distance, (1 - directions @ directions[row[0]]).clamp(min=0))
        distance[row] = 0
    return pool[torch.cat(chosen)]


def train_sae(
    x: Float[Tensor, "N D"], config: BatchTopKConfig, metadata: dict[str, Any], folder: Path, progress: Progress
) -> None:
    """Train an SAE on the rows of `x` with sae-lens, and write it to `folder`; `metadata` must hold `hook_name`."""
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, LoggingConfig, SAETrainer
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.sae import SAEMetadata

    scale = unit_scale(x)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        sae = BatchTopKTrainingSAE(
            BatchTopKTrainingSAEConfig(
                d_in=x.shape[1],
                d_sae=config.num_latents,
                k=config.num_active,
                topk_threshold_lr=THRESHOLD_RATE,
                metadata=SAEMetadata(**metadata),
            )
        )
    with torch.no_grad():
        sae.b_dec.copy_(x.mean(0) * scale)
        rows = spread_rows(x, config.num_latents, config.seed)
        sae.W_dec.copy_(INITIAL_NORM * nn.functional.normalize(x[rows] - x.mean(0), dim=-1))
        sae.W_enc.copy_(sae.W_dec.T)
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=config.steps * config.batch_size,
            train_batch_size_samples=config.batch_size,
            lr=config.learning_rate,
            lr_end=config.learning_rate / 10,
            lr_warm_up_steps=config.warmup,
            lr_decay_steps=config.decay,
            dead_feature_window=config.dead_after,
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae,
        iter(()),
    )
    # The trainer's own `fit` draws a progress bar, so its steps are taken one by one; scaling is folded in afterwards.
    for step, rows in enumerate(shuffled_batches(len(x), config)):
        trainer.maybe_reset_sparsity()
        loss = trainer.step(x[rows] * scale).loss
        trainer.n_training_steps += 1
        progress(step + 1, loss.item())
    sae.fold_activation_norm_scaling_factor(scale)
    trainer.set_final_sae_metadata()
    sae.save_inference_model(folder)


class SkipTranscoder(nn.Module):
    """Trainable skip transcoder in scaled units; its threshold is a running mean and no parameter.

    Latents begin as spread rows of `x`, each answered by what the best linear map leaves of that row's `y`.
    """

    def __init__(self, x: Float[Tensor, "N D"], y: Float[Tensor, "N D"], config: BatchTopKConfig):
        super().__init__()
        x_mean, y_mean = x.mean(0), y.mean(0)
        linear = torch.linalg.lstsq(x - x_mean, y - y_mean).solution
        rows = spread_rows(x, config.num_latents, config.seed)
        left = y[rows] - y_mean - (x[rows] - x_mean) @ linear
        self.encoder = nn.Parameter(INITIAL_NORM * nn.functional.normalize(x[rows] - x_mean, dim=-1).T)
        self.encoder_bias = nn.Parameter(-x_mean @ self.encoder.detach())
        self.decoder = nn.Parameter(INITIAL_NORM * nn.functional.normalize(left, dim=-1))
        self.decoder_bias = nn.Parameter(y_mean - x_mean @ linear)
        self.skip = nn.Parameter(linear.T.clone())
        self.threshold = 0.0
        self.num_active = config.num_active

    def latents(self, x: Float[Tensor, "B D"]) -> tuple[Float[Tensor, "B F"], Float[Tensor, "B F"]]:
        """What stays, and everything before the choice; both in units of the decoder rows' norms."""
        before = (x @ self.encoder + self.encoder_bias) * self.decoder.norm(dim=-1)
        flat = before.relu().flatten()
        largest = flat.topk(self.num_active * len(x))
        return torch.zeros_like(flat).scatter(0, largest.indices, largest.values).view_as(before), before

    def decode(self, latents: Float[Tensor, "B F"]) -> Float[Tensor, "B D"]:
        return latents @ nn.functional.normalize(self.decoder, dim=-1)

    def follow_threshold(self, kept: Float[Tensor, "B F"]) -> None:
        positive = kept[kept > 0]
        if len(positive):
            self.threshold += THRESHOLD_RATE * (positive.min().item() - self.threshold)


def train_skip_transcoder(
    x: Float[Tensor, "N D"], y: Float[Tensor, "N D"], config: BatchTopKConfig, layer: int, progress: Progress
) -> SparseCoder:
    """A skip transcoder from an MLP's inputs `x` to its outputs `y`, in their own units, decoder rows of norm 1."""
    scale_x, scale_y = unit_scale(x), unit_scale(y)
    model = SkipTranscoder(x * scale_x, y * scale_y, config)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, config))
    silent = torch.zeros(config.num_latents, dtype=torch.long)
    for step, rows in enumerate(shuffled_batches(len(x), config)):
        inputs, outputs = x[rows] * scale_x, y[rows] * scale_y
        kept, before = model.latents(inputs)
        residual = outputs - (model.decode(kept) + model.decoder_bias + inputs @ model.skip.T)
        loss = residual.square().sum(-1).mean()
        optimizer.zero_grad(set_to_none=True)
        (loss + _revival_loss(model, before, residual.detach(), silent > config.dead_after)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        model.follow_threshold(kept.detach())
        silent = torch.where((kept > 0).any(0), 0, silent + 1)
        progress(step + 1, loss.item())
    return _exported(model, scale_x, scale_y, layer)


def _rate(step: int, config: BatchTopKConfig) -> float:
    """Share of the learning rate: linear rise, plateau, linear fall to a tenth."""
    rise = min(1.0, (step + 1) / config.warmup)
    fall = max(0.0, (step - (config.steps - config.decay)) / config.decay)
    return rise * (1 - 0.9 * fall)


def _revival_loss(
    model: SkipTranscoder, before: Float[Tensor, "B F"], residual: Float[Tensor, "B D"], dead: Tensor
) -> Float[Tensor, ""]:
    """How badly the dead latents alone explain what is left over (Gao et al. 2024, appendix A.2)."""
    count = int(dead.sum())
    if count == 0:
        return residual.new_zeros(())
    share = min(1.0, count / (residual.shape[1] // 2))
    largest = before.masked_fill(~dead, -torch.inf).topk(min(count, residual.shape[1] // 2), dim=-1)
    latents = torch.zeros_like(before).scatter(-1, largest.indices, largest.values)
    return share * (model.decode(latents) - residual).square().sum(-1).mean()


@torch.no_grad()
def _exported(model: SkipTranscoder, scale_x: float, scale_y: float, layer: int) -> SparseCoder:
    """Scales folded into the weights: the same function of unscaled vectors."""
    norms = model.decoder.norm(dim=-1) / scale_y
    return SparseCoder(
        kind="transcoder",
        layer=layer,
        encoder=(model.encoder * scale_x * norms).detach(),
        encoder_bias=(model.encoder_bias * norms).detach(),
        decoder=nn.functional.normalize(model.decoder, dim=-1).detach(),
        decoder_bias=(model.decoder_bias / scale_y).detach(),
        threshold=torch.full_like(model.encoder_bias, model.threshold / scale_y),
        skip=(model.skip * scale_x / scale_y).detach(),
    )
