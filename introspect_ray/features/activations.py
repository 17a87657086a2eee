"""What sparse coders read: activations of a model at every token of many texts. D model width, N tokens in all."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from introspect_ray.features.reading import read_places


def residual_outputs(model: PreTrainedModel, texts: Sequence[Sequence[int]], layer: int) -> Float[Tensor, "N D"]:
    """Output of decoder layer `layer` at every token but the first of each text, texts in order."""
    return read_places(model, texts, layer, ["residual"])[0]


def mlp_inputs_outputs(
    model: PreTrainedModel, texts: Sequence[Sequence[int]], layer: int
) -> tuple[Float[Tensor, "N D"], Float[Tensor, "N D"]]:
    """Input (after its norm) and output of the MLP of decoder layer `layer`, at the tokens of `residual_outputs`."""
    inputs, outputs = read_places(model, texts, layer, ["mlp_input", "mlp_output"])
    return inputs, outputs
