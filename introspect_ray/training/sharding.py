"""FSDP2: every decoder layer is one unit, what is left of the explainer (embeddings, head, norms) another.

    Explainer.stream -> each layer arrives -> fully_shard(layer) -> the rest arrives -> fully_shard(explainer)

Projections stay whole on every worker: a batch uses the maps of some layers only, and the workers of a sharded unit
would wait for gradients that others do not have. Their gradients are summed apart, like those of an unsharded run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from introspect_ray.config import TrainConfig
from introspect_ray.explainer.card import TargetInfo
from introspect_ray.explainer.model import Explainer
from introspect_ray.models.paths import resolve_device

FORWARD_METHODS = ("loss", "answer")
"""Methods of the explainer that run it; all workers must call them equally often, on batches of any size."""


def streamed_explainer(config: TrainConfig, target: TargetInfo) -> Explainer:
    """The untrained explainer of `config` in its weights' dtype, adapters and quantization included, sharded over all
    workers where the config says so."""
    is_sharded = config.trainer.sharding == "fsdp2"
    options = _options(config) if is_sharded else {}

    def loaded(layer: nn.Module) -> None:
        if is_sharded:
            fully_shard(layer, **options)

    explainer = Explainer.stream(
        config.explainer,
        target,
        config.seed,
        None if config.method == "full" else config.lora,
        _quantized_compute_dtype(config),
        loaded,
    )
    if is_sharded:
        fully_shard(explainer, ignored_params=set(explainer.projections.parameters()), **options)
        for module in explainer.modules():
            if isinstance(module, FSDPModule):
                # Sums over the workers: each has divided by the answer tokens of the whole step already.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        for method in FORWARD_METHODS:
            register_fsdp_forward_method(explainer, method)
    return explainer


def _options(config: TrainConfig) -> dict[str, Any]:
    compute = torch.bfloat16 if config.trainer.compute_dtype == "bfloat16" else None
    return {
        "mesh": _all_workers(resolve_device(config.explainer.model.device)),
        "reshard_after_forward": True,
        "mp_policy": MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32),
    }


def _quantized_compute_dtype(config: TrainConfig) -> torch.dtype | None:
    if config.method != "qlora":
        return None
    dtype = config.explainer.model.dtype
    if config.trainer.compute_dtype == "bfloat16" or dtype == "auto":
        return torch.bfloat16
    return cast(torch.dtype, getattr(torch, dtype))


def _all_workers(device: torch.device) -> DeviceMesh:
    """One dimension, all workers in it. A process that nobody has put into a group is one of its own."""
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("workers",))


def checkpoint_activations(explainer: Explainer) -> None:
    """Recompute each decoder layer in the backward pass; dropout draws what it drew before."""
    explainer.causal.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def whole_parameters(explainer: Explainer) -> Iterator[tuple[str, Tensor]]:
    """Name in `explainer.model` -> whole trained parameter on the CPU, one by one; all workers must take them all."""
    for name, parameter in explainer.model.named_parameters():
        if parameter.requires_grad:
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            yield name, whole.detach().cpu()
