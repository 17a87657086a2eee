"""One batch of texts under all conditions: losses, how well activations were simulated, and which latents hurt.

    texts -> unchanged target -> true code -> for every condition: edited code -> decoded, written -> losses

All conditions see the same texts, so that they can be compared text by text. B texts, M measured tokens, S latents.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from introspect_ray.features.coder import ActiveLatents, SparseCoder
from introspect_ray.rewrite.code import columns_of, decode, empty, moved, paper_random, replaced
from introspect_ray.rewrite.lines import Levels, Line, count_of, fired
from introspect_ray.rewrite.site import Batch, Site, TextLosses, Written
from introspect_ray.rewrite.statistics import LatentStatistics, latent_statistics, slopes_of
from introspect_ray.rewrite.texts import RewriteText

ORIGINAL, TRUE, ZERO = "original", "true latents", "zero latents"
BASELINES = (ORIGINAL, TRUE, ZERO, "zero output", "mean output", "random latents")
P2_ACTIVE = 32
"""Random latents that P2 activates."""
FALSE_ALARMS_KEPT = 2
"""Of each latent and batch: the false alarms that were said to be strongest."""
LOGITS_AT_ONCE = 1 << 27
"""Next-token log-probabilities of one batch, held twice (512 MB each in float32)."""


@dataclass(frozen=True, eq=False)
class MeasurePlan:
    """What is the same for all batches."""

    lines: Sequence[Line]
    fractions: Sequence[float]
    live: Int[np.ndarray, " L"]
    """Latents that fractions are of."""
    mean_output: Float[np.ndarray, " D"]
    top_k: int | None
    headline: str
    headline_fraction: float
    paper_compat: bool
    seed: int

    def counts(self, line: Line) -> Iterator[tuple[float, int]]:
        """Fractions that the line reaches, and the number of its latents that they are.

        The fraction 1 stands for all of its latents, also where some live ones lack a description.
        """
        for fraction in self.fractions:
            count = count_of(fraction, len(self.live))
            if fraction == line.config.max_fraction == 1:
                yield fraction, len(line.latents)
            elif count <= len(line.latents):
                yield fraction, count


@dataclass(frozen=True)
class Agreement:
    """Sums over measured tokens for each of S latents, in the order of its line."""

    line: str
    sums: Float[np.ndarray, "S 9"]
    """Tokens, true and false positives, false negatives, then the sums of p, t, pp, tt, pt (predicted, true)."""


@dataclass(frozen=True)
class FalseAlarm:
    latent: int
    row: int
    """Source row of the text."""
    position: int
    """In its ids."""
    value: float


@dataclass
class Measured:
    """What came of a batch."""

    rows: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    losses: dict[str, TextLosses] = field(default_factory=dict)
    complete: dict[str, Bool[np.ndarray, " B"]] = field(default_factory=dict)
    """Texts in which every chosen latent was simulated."""
    agreement: list[Agreement] = field(default_factory=list)
    harm: Float[np.ndarray, " S"] | None = None
    """Nats that the headline's latents cost, to first order around the true latents."""
    false_alarms: list[FalseAlarm] = field(default_factory=list)


def condition_name(line: str, fraction: float) -> str:
    return f"{line} @ {fraction:g}"


def text_batches(texts: Sequence[RewriteText], vocabulary: int) -> Iterator[tuple[int, int]]:
    """Ranges of texts of which the log-probabilities fit `LOGITS_AT_ONCE`, or single texts."""
    start = size = 0
    for index, text in enumerate(texts):
        if index > start and (size + len(text.positions)) * vocabulary > LOGITS_AT_ONCE:
            yield start, index
            start = index
            size = 0
        size += len(text.positions)
    if texts:
        yield start, len(texts)


def read_truth(site: Site, coder: SparseCoder, texts: Sequence[RewriteText]) -> tuple[ActiveLatents, LatentStatistics]:
    """True code at the measured positions, and the statistics of these texts."""
    batch = Batch(texts, site.device)
    written = site.read(batch)
    code = coder.encode_sparse(written.x)
    gradient = site.gradient(batch, decode(coder, code, written.x))
    return code, latent_statistics(coder, code, written.y, gradient)


def measure(
    site: Site,
    coder: SparseCoder,
    texts: Sequence[RewriteText],
    levels: Mapping[str, Levels],
    plan: MeasurePlan,
) -> Measured:
    """All conditions of one batch; `levels` by name of the simulator."""
    batch = Batch(texts, site.device)
    written = site.read(batch)
    code = coder.encode_sparse(written.x)
    clean = site.log_probabilities(batch, None)
    found = Measured([text.row for text in texts], [len(text.positions) for text in texts])
    for name, output in _baselines(coder, code, written, plan, texts[0].row):
        found.losses[name] = site.losses(batch, clean, output)
        found.complete[name] = np.ones(len(texts), dtype=bool)
    for line in plan.lines:
        _measure_line(site, coder, texts, batch, clean, code, written, levels, plan, line, found)
    return found


def _baselines(
    coder: SparseCoder, code: ActiveLatents, written: Written, plan: MeasurePlan, row: int
) -> Iterator[tuple[str, Float[Tensor, "M D"] | None]]:
    """What is written in each condition that simulates nothing; `None` changes nothing."""
    live = torch.as_tensor(plan.live, device=code.latents.device)
    if plan.paper_compat:
        random = paper_random(code, live, P2_ACTIVE, plan.seed + row)
    else:
        random = moved(code, live, plan.seed + row)
    mean = torch.as_tensor(plan.mean_output, dtype=torch.float32, device=written.y.device)
    outputs = {
        ORIGINAL: None,
        TRUE: decode(coder, code, written.x),
        ZERO: decode(coder, empty(code), written.x),
        "zero output": torch.zeros_like(written.y),
        "mean output": mean.expand_as(written.y),
        "random latents": decode(coder, random, written.x),
    }
    assert tuple(outputs) == BASELINES
    yield from outputs.items()


def _measure_line(
    site: Site,
    coder: SparseCoder,
    texts: Sequence[RewriteText],
    batch: Batch,
    clean: Float[Tensor, "M V"],
    code: ActiveLatents,
    written: Written,
    levels: Mapping[str, Levels],
    plan: MeasurePlan,
    line: Line,
    found: Measured,
) -> None:
    chosen = torch.as_tensor(line.latents, device=code.latents.device)
    truth = columns_of(code, chosen).cpu().numpy()
    values = line.values(levels.get(line.config.simulator), truth).astype(np.float32)
    simulated = torch.as_tensor(values, device=code.values.device)
    for fraction, count in plan.counts(line):
        name = condition_name(line.config.name, fraction)
        edited = replaced(code, chosen[:count], simulated[:, :count], plan.top_k)
        found.losses[name] = site.losses(batch, clean, decode(coder, edited, written.x))
        found.complete[name] = _complete(texts, values[:, :count])
    if line.config.kind in ("simulated", "oracle_levels"):
        found.agreement.append(Agreement(line.config.name, _agreement(values, truth, line.maximum)))
    if line.config.name == plan.headline:
        count = count_of(plan.headline_fraction, len(plan.live))
        gradient = site.gradient(batch, decode(coder, code, written.x))
        slopes = slopes_of(coder, chosen[:count], gradient).double().cpu().numpy()
        wrong = np.nan_to_num(values[:, :count] - truth[:, :count])
        found.harm = (wrong * slopes).sum(0)
        found.false_alarms += _false_alarms(texts, line, values[:, :count], truth[:, :count])


def _complete(texts: Sequence[RewriteText], values: Float[np.ndarray, "M S"]) -> Bool[np.ndarray, " B"]:
    ends = np.cumsum([len(text.positions) for text in texts])
    missing = np.isnan(values).any(1)
    return np.array([not part.any() for part in np.split(missing, ends[:-1])])


def _agreement(
    values: Float[np.ndarray, "M S"], truth: Float[np.ndarray, "M S"], maximum: Float[np.ndarray, " S"]
) -> Float[np.ndarray, "S 9"]:
    known = ~np.isnan(values)
    predicted, true = np.where(known, values, 0.0).astype(np.float64), np.where(known, truth, 0.0).astype(np.float64)
    says, fires = fired(predicted, maximum) & known, true > 0
    columns = (
        known,
        says & fires,
        says & ~fires,
        ~says & fires,
        predicted,
        true,
        predicted**2,
        true**2,
        predicted * true,
    )
    return np.stack([column.sum(0, dtype=np.float64) for column in columns], axis=1)


def _false_alarms(
    texts: Sequence[RewriteText], line: Line, values: Float[np.ndarray, "M S"], truth: Float[np.ndarray, "M S"]
) -> list[FalseAlarm]:
    where = [(text.row, position) for text in texts for position in text.positions]
    said = np.where(truth > 0, 0.0, np.nan_to_num(values)) * fired(values, line.maximum[: values.shape[1]])
    alarms = []
    for column in np.flatnonzero(said.any(0)):
        for token in np.argsort(-said[:, column])[:FALSE_ALARMS_KEPT]:
            if said[token, column] > 0:
                row, position = where[int(token)]
                alarms.append(FalseAlarm(int(line.latents[column]), row, position, float(said[token, column])))
    return alarms
