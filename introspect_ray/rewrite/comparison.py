"""Where the loss of the headline comes from: paired differences between conditions at one fraction of the latents.

    true latents -> rounded to levels -> descriptions read exactly -> the headline        the path, step by step
    the headline <-> every line that differs from it in one respect                       what each choice is worth

Both ends of a difference replace the same latents on the same texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from introspect_ray.config import RewriteLineConfig
from introspect_ray.evaluation.intervals import Bootstrap, Interval, ratio_interval
from introspect_ray.rewrite.measure import TRUE, ZERO, condition_name
from introspect_ray.rewrite.scores import Losses

_RESPECTS = ("source", "simulator", "descriptions", "scale", "repaired")
"""What a simulated line may differ in, but for the order of its latents."""


@dataclass(frozen=True)
class Difference:
    """What going from one condition to another costs, on the texts that both cover."""

    what: str
    before: str
    after: str
    loss: Interval
    """Nats of cross-entropy per token; positive: the second condition loses more."""
    share: Interval
    """The same as a share of the gap between zero latents and true latents."""
    divergence: Interval
    """Nats of KL per token."""


@dataclass(frozen=True)
class Comparison:
    """Everything about the headline, in words and numbers."""

    path: Sequence[Difference]
    """From true latents to the headline; a step without the line that it needs is part of the next one."""
    changes: Sequence[Difference]
    """From the headline to every line that differs in one respect: positive means that the headline is better."""


def compare(
    lines: Sequence[RewriteLineConfig],
    headline: str,
    fraction: float,
    exact: frozenset[str],
    losses: Losses,
    options: Bootstrap,
) -> Comparison:
    """Differences of all conditions that were measured at `fraction`.

    Args:
        headline: name of its line.
        exact: names of the simulators that read descriptions without error.
    """
    (own,) = [line for line in lines if line.name == headline]
    measured = [line for line in lines if condition_name(line.name, fraction) in losses.cross_entropy]

    def difference(what: str, before: str, after: str) -> Difference:
        covered = losses.complete[before] & losses.complete[after]
        tokens = losses.tokens[covered]
        nats = (losses.cross_entropy[after] - losses.cross_entropy[before])[covered]
        gap = (losses.cross_entropy[ZERO] - losses.cross_entropy[TRUE])[covered]
        apart = (losses.divergence[after] - losses.divergence[before])[covered]
        return Difference(
            what,
            before,
            after,
            ratio_interval(nats, tokens, options),
            ratio_interval(nats, gap, options),
            ratio_interval(apart, tokens, options),
        )

    steps = [(what, condition_name(line.name, fraction)) for what, line in _path(measured, own, exact)]
    befores = [TRUE, *(name for _, name in steps)]
    end = condition_name(headline, fraction)
    return Comparison(
        path=[difference(what, before, after) for before, (what, after) in zip(befores, steps, strict=False)],
        changes=[difference(what, end, condition_name(line.name, fraction)) for what, line in _changes(measured, own)],
    )


def _path(
    lines: Sequence[RewriteLineConfig], own: RewriteLineConfig, exact: frozenset[str]
) -> Iterator[tuple[str, RewriteLineConfig]]:
    """(What the step does, the line at its end), from the true latents to the headline."""
    if own.kind == "simulated":
        levels = [line for line in lines if line.kind == "oracle_levels" and line.selection == own.selection]
        read = [line for line in lines if line.simulator in exact and _differs(line, own) == ["simulator"]]
        for line in levels[:1]:
            yield "format: true values rounded to levels", line
        for line in read[:1]:
            yield f"descriptions: read by {line.simulator}, {line.scale}", line
        if read:
            yield f"simulator: {own.simulator} instead of {read[0].simulator}", own
            return
    yield f"all else: {own.name}", own


def _changes(lines: Sequence[RewriteLineConfig], own: RewriteLineConfig) -> Iterator[tuple[str, RewriteLineConfig]]:
    """(What is different, the line) of all lines on the same latents that differ from the headline in one respect."""
    for line in lines:
        if line.kind == "deleted" and own.kind == "simulated" and line.selection == own.selection:
            yield "the same latents deleted", line
        elif len(respects := _differs(line, own)) == 1:
            yield f"{respects[0]}: {_word(line, respects[0])} instead of {_word(own, respects[0])}", line


def _differs(line: RewriteLineConfig, own: RewriteLineConfig) -> list[str]:
    """Respects in which two simulated lines on the same latents differ; none for other pairs of lines."""
    if not line.kind == own.kind == "simulated" or line.selection != own.selection:
        return []
    return [respect for respect in _RESPECTS if getattr(line, respect) != getattr(own, respect)]


def _word(line: RewriteLineConfig, respect: str) -> str:
    return str(getattr(line, respect)).replace("_", " ")
