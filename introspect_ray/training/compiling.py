"""torch.compile, decoder layer by decoder layer: layers of one kind share what was compiled for the first."""

from __future__ import annotations

import shutil

import torch

from introspect_ray.errors import UserError
from introspect_ray.explainer.model import Explainer
from introspect_ray.models.structure import decoder_layers

VARIANTS = 64
"""Kinds of layers, masks and gradient modes that may be compiled side by side; torch's own 8 are too few for all."""


def compile_layers(explainer: Explainer) -> None:
    """Have every decoder layer compiled when it first runs, for rows of any number and length.

    Raises:
        UserError: this machine has no C++ compiler, which compiling needs on a CPU and to build Triton's launchers.
    """
    from torch._inductor import cpp_builder, exc

    try:
        compiler = cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        compiler = ""
    if not shutil.which(compiler):
        raise UserError("trainer.compile needs a C++ compiler (g++ or clang++, or CXX naming one), found none")
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    for layer in decoder_layers(explainer.causal):
        layer.compile(dynamic=True)
