"""Training of sparse coders with BatchTopK: the largest k x batch size latents of a whole batch stay.

What both kinds of coders share, and skip transcoders (P2 section 3), for which sae-lens has no trainer; SAEs are in
sae_training.py. A coder trained so ends as a JumpReLU coder whose one threshold is the running minimum of what stayed
in a batch. B vectors of a batch, D width, F latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from introspect_ray.features.coder import SparseCoder, fraction_unexplained
from introspect_ray.features.snapshots import Snapshot, optimizer_snapshot, restore_optimizer, with_prefix

Progress = Callable[[int, float], None]
"""Called after every step with the number of steps done and the loss."""

SEEDING_POOL = 50_000
"""Rows from which the first directions are drawn."""

SPREAD_LATENTS = 4096
"""Latents that begin as spread rows; further ones as any other rows, because spreading costs F passes over the pool."""

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
    order = torch.randperm(len(x), generator=generator)
    pool = order[:SEEDING_POOL]
    directions = nn.functional.normalize(x[pool] - x.mean(0), dim=-1)
    distance = torch.ones(len(pool))
    chosen: list[Tensor] = []
    for _ in range(min(count, SPREAD_LATENTS)):
        weights = distance if distance.sum() > 0 else torch.ones(len(pool))
        row = torch.multinomial(weights, 1, generator=generator)
        chosen.append(row)
        distance = torch.minimum(distance, (1 - directions @ directions[row[0]]).clamp(min=0))
        distance[row] = 0
    spread = pool[torch.cat(chosen)]
    if count <= SPREAD_LATENTS:
        return spread
    others = order[~torch.isin(order, spread)]
    assert len(others) >= count - len(spread), f"{len(x)} rows are too few for {count} latents to begin as"
    return torch.cat([spread, others[: count - len(spread)]])


@dataclass(frozen=True)
class Measures:
    """How a coder does on one batch."""

    unexplained: float
    """Fraction of the batch's variance that is unexplained."""
    active: float
    """Mean number of latents per vector that are not zero."""
    dead: int
    """Latents that have not fired for `dead_after` steps."""


class CoderTraining(Protocol):
    """A coder being trained, one batch at a time, by whatever trainer; `y` of an SAE is its `x`."""

    @property
    def steps_done(self) -> int:
        """Optimizer steps taken."""

    def step(self, x: Float[Tensor, "B D"], y: Float[Tensor, "B D"]) -> float:
        """One optimizer step; the loss."""

    def measures(self) -> Measures:
        """How the last step's batch was coded, before that step."""

    def snapshot(self) -> Snapshot:
        """All that is needed to go on."""


class SkipTranscoder(nn.Module):
    """Trainable skip transcoder in scaled units; its threshold is a running mean and no parameter."""

    def __init__(self, width_in: int, width_out: int, config: BatchTopKConfig):
        super().__init__()
        # Transposed in memory, in a new model as in a restored one, because sums round by the layout.
        self.encoder = nn.Parameter(torch.zeros(config.num_latents, width_in).T)
        self.encoder_bias = nn.Parameter(torch.zeros(config.num_latents))
        self.decoder = nn.Parameter(torch.zeros(config.num_latents, width_out))
        self.decoder_bias = nn.Parameter(torch.zeros(width_out))
        self.skip = nn.Parameter(torch.zeros(width_out, width_in))
        self.threshold = 0.0
        self.num_active = config.num_active

    @classmethod
    def begun(cls, x: Float[Tensor, "N D"], y: Float[Tensor, "N D_out"], config: BatchTopKConfig) -> SkipTranscoder:
        """Latents begin as spread rows of `x`, each answered by what the best linear map leaves of that row's `y`."""
        model = cls(x.shape[1], y.shape[1], config)
        x_mean, y_mean = x.mean(0), y.mean(0)
        # In float64, because the last bits of what LAPACK solves change from call to call.
        linear = torch.linalg.lstsq((x - x_mean).double(), (y - y_mean).double()).solution.float()
        rows = spread_rows(x, config.num_latents, config.seed)
        left = y[rows] - y_mean - (x[rows] - x_mean) @ linear
        with torch.no_grad():
            model.encoder.copy_(INITIAL_NORM * nn.functional.normalize(x[rows] - x_mean, dim=-1).T)
            model.encoder_bias.copy_(-x_mean @ model.encoder)
            model.decoder.copy_(INITIAL_NORM * nn.functional.normalize(left, dim=-1))
            model.decoder_bias.copy_(y_mean - x_mean @ linear)
            model.skip.copy_(linear.T)
        return model

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


class TranscoderTraining:
    """A skip transcoder from an MLP's inputs to its outputs being trained."""

    def __init__(
        self, model: SkipTranscoder, scales: tuple[float, float], config: BatchTopKConfig, device: str = "cpu"
    ):
        """`scales` bring inputs and outputs to the units in which `model` works."""
        self.model = model.to(device)
        self.scales = scales
        self.config = config
        self.steps_done = 0
        self._optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, lambda step: _rate(step, config))
        self._silent = torch.zeros(config.num_latents, dtype=torch.long, device=device)
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    @classmethod
    def begun(
        cls, x: Float[Tensor, "N D"], y: Float[Tensor, "N D_out"], config: BatchTopKConfig, device: str = "cpu"
    ) -> TranscoderTraining:
        """Weights and scales from a sample of what it will be trained on."""
        scale_x, scale_y = unit_scale(x), unit_scale(y)
        return cls(SkipTranscoder.begun(x * scale_x, y * scale_y, config), (scale_x, scale_y), config, device)

    def step(self, x: Float[Tensor, "B D"], y: Float[Tensor, "B D_out"]) -> float:
        model, device = self.model, self._silent.device
        inputs, outputs = x.to(device) * self.scales[0], y.to(device) * self.scales[1]
        kept, before = model.latents(inputs)
        residual = outputs - (model.decode(kept) + model.decoder_bias + inputs @ model.skip.T)
        loss = residual.square().sum(-1).mean()
        self._optimizer.zero_grad(set_to_none=True)
        dead = self._silent > self.config.dead_after
        (loss + _revival_loss(model, before, residual.detach(), dead)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        self._optimizer.step()
        self._schedule.step()
        model.follow_threshold(kept.detach())
        self._silent = torch.where((kept > 0).any(0), 0, self._silent + 1)
        self._last = outputs - residual.detach(), outputs, kept.detach()
        self.steps_done += 1
        return loss.item()

    def measures(self) -> Measures:
        assert self._last is not None, "no step was taken"
        predicted, true, latents = self._last
        return Measures(
            unexplained=fraction_unexplained(predicted, true),
            active=(latents > 0).sum().item() / len(latents),
            dead=int((self._silent > self.config.dead_after).sum()),
        )

    def snapshot(self) -> Snapshot:
        moments = optimizer_snapshot(self._optimizer)
        tensors = with_prefix("model.", self.model.state_dict()) | with_prefix("optimizer.", moments.tensors)
        numbers = {"steps_done": self.steps_done, "threshold": self.model.threshold, "scales": self.scales}
        numbers |= {"optimizer": moments.numbers, "schedule": self._schedule.last_epoch}
        return Snapshot(tensors | {"silent": self._silent}, numbers)

    @classmethod
    def restored(cls, snapshot: Snapshot, config: BatchTopKConfig, device: str = "cpu") -> TranscoderTraining:
        """The training that `snapshot` was taken of."""
        weights, numbers = snapshot.part("model."), snapshot.numbers
        model = SkipTranscoder(weights["encoder"].shape[0], weights["decoder"].shape[1], config)
        model.load_state_dict(weights)
        model.threshold = numbers["threshold"]
        training = cls(model, tuple(numbers["scales"]), config, device)
        training._schedule.last_epoch = numbers["schedule"]
        restore_optimizer(training._optimizer, snapshot.part("optimizer."), numbers["optimizer"])
        training._silent = snapshot.tensors["silent"].to(device)
        training.steps_done = numbers["steps_done"]
        return training

    def coder(self, layer: int) -> SparseCoder:
        """The coder of layer `layer` in the units of what was given, decoder rows of norm 1."""
        return _exported(self.model, *self.scales, layer).to("cpu")


def train_skip_transcoder(
    x: Float[Tensor, "N D"], y: Float[Tensor, "N D"], config: BatchTopKConfig, layer: int, progress: Progress
) -> SparseCoder:
    """A skip transcoder from an MLP's inputs `x` to its outputs `y`, all of which are in memory."""
    training = TranscoderTraining.begun(x, y, config)
    for step, rows in enumerate(shuffled_batches(len(x), config)):
        progress(step + 1, training.step(x[rows], y[rows]))
    return training.coder(layer)


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
