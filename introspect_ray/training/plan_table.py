"""A plan as a table for people."""

from __future__ import annotations

from collections.abc import Mapping

from introspect_ray.training.hardware import GPUS
from introspect_ray.training.needs import GIB, Memory
from introspect_ray.training.plan import Plan


def table(plan: Plan) -> str:
    """The plan for people."""
    config, memory, pace, census = plan.config, plan.memory, plan.pace, plan.census
    trainer = config.trainer
    unit, unit_bytes = ("GiB", GIB) if memory.peak >= GIB else ("MiB", GIB / 1024)
    amounts = {name: getattr(memory, name) / unit_bytes for name in Memory._fields}
    standing = {
        "weights": f"weights ({census.base / 1e6:,.0f} M parameters)",
        "adapters": "adapters and projections",
        "gradients": "gradients",
        "optimizer": "optimizer state (AdamW)",
    }
    step = {
        "gathered": "whole weights outside the layers",
        "activations": "activations kept" + (" (layer inputs)" if trainer.activation_checkpointing else ""),
        "logits": f"with them: logits at {plan.batch.num_answer_tokens} answer positions",
        "working": "  or: one layer at work",
        "inputs": "later: gradients of embeddings",
        "message": "later, alone: summing gradients",
        "evaluation": "between steps: answers of an evaluation",
    }

    def rows(names: Mapping[str, str]) -> list[str]:
        return [f"  {text:<44}{amounts[name]:>9.2f}" for name, text in names.items() if amounts[name] >= 0.005]

    lines = [
        f"plan: {config.explainer.model.path}, {config.method}, sharding {trainer.sharding}, {_devices(plan)}",
        f"memory of one worker between steps, {unit}:",
        *rows(standing),
        "in a step beside it:",
        *rows(step),
        f"{'peak':<46}{memory.peak / unit_bytes:>9.2f}{_limit(plan)}",
        f"host memory per worker: {plan.host_bytes / GIB:.1f} GiB (loading, or copies for a checkpoint)",
        f"examples: {plan.workload.num_examples:,}, {plan.workload.source}",
        f"  mean {plan.workload.mean_tokens:.0f} tokens ({plan.workload.mean_answer:.0f} of the answer), "
        f"longest {plan.workload.longest}; largest micro-batch {plan.batch.rows} x {plan.batch.tokens_per_row}",
        f"steps: {pace.steps:,} of {config.optimization.batch_size} examples, {pace.tokens_per_step:,.0f} tokens and "
        f"{pace.flop_per_step / 1e12:,.3g} TFLOP",
    ]
    if trainer.compile:
        lines.append("torch.compile is not counted: what it fuses takes less memory and time, compiling takes some")
    if pace.seconds_per_step is not None:
        total = pace.seconds_per_step * pace.steps
        lines.append(
            f"time: {_duration(total)} at {pace.seconds_per_step:.2f} s per step "
            f"({pace.tokens_per_step / pace.seconds_per_step:,.0f} tokens/s, bound by {pace.bound}; "
            f"{config.plan.share_of_peak:.0%} of peak assumed, loading and checkpoints not counted)"
        )
        lines.append(
            _rent(total / 3600 * trainer.num_workers * trainer.gpus_per_worker, config.plan.price_per_gpu_hour)
        )
    return "\n".join(lines)


def _devices(plan: Plan) -> str:
    workers = plan.config.trainer.num_workers
    if not plan.has_gpus:
        return f"{workers} CPU workers"
    nodes = f" on {plan.num_nodes} nodes" if plan.num_nodes > 1 else ""
    return f"{workers} x {plan.config.plan.gpu}{nodes}"


def _limit(plan: Plan) -> str:
    if plan.usable_bytes is None:
        return ""
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    share, whole = plan.config.plan.usable_share, GPUS[plan.config.plan.gpu].memory_gib
    return f"  of {plan.usable_bytes / GIB:.1f} usable ({share:.0%} of {whole}): {verdict}"


def _rent(gpu_hours: float, price: float | None) -> str:
    """GPUs are paid for whether they compute or wait for each other."""
    line = f"rent: {gpu_hours:.1f} GPU hours"
    return line if price is None else f"{line}, {gpu_hours * price:,.2f} at {price:g} each"


def _duration(seconds: float) -> str:
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} days"
