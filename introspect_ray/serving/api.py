"""Requests and answers of the HTTP API, as the gateway and the client share them. Nothing here needs Ray or torch.

L layers, P positions, T tokens, D the target's width. Positions count the target's tokens from 0, begin-of-text too.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
from jaxtyping import Float
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from introspect_ray.config import TaskName
from introspect_ray.config.serving import NAME_PATTERN

ErrorCode = Literal[
    "bad_request", "unauthorized", "not_found", "too_large", "busy", "unavailable", "timeout", "internal"
]
STATUS: dict[ErrorCode, int] = {
    "bad_request": 400,
    "unauthorized": 401,
    "not_found": 404,
    "too_large": 413,
    "busy": 503,
    "unavailable": 503,
    "timeout": 503,
    "internal": 500,
}
"""HTTP status of an error that is a whole answer; all 503 may be tried again after `Retry-After` seconds."""

Name = Annotated[str, Field(pattern=NAME_PATTERN, max_length=64)]
Text = Annotated[str, Field(min_length=1)]
Index = Annotated[int, Field(ge=0, le=2**31 - 1)]
Number = Annotated[float, Field(allow_inf_nan=False)]


def _different(numbers: list[int]) -> list[int]:
    if len(set(numbers)) < len(numbers):
        raise PydanticCustomError("not_different", "a number occurs twice, expected different ones")
    return numbers


MOST_INDICES = 65536
"""Layers or positions that a request may name: more than any model has, and few enough to be looked at."""
Indices = Annotated[
    list[Index],
    Field(min_length=1, max_length=MOST_INDICES, json_schema_extra={"uniqueItems": True}),
    AfterValidator(_different),
]


class _Api(BaseModel):
    """Closed to keys it does not know; no number is read from a string."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


# --- errors ----------------------------------------------------------------------------------------------------


class ApiError(_Api):
    """What went wrong, in one line, and with which field of the request."""

    code: ErrorCode
    message: str
    field: str | None = None


class Failed(_Api):
    """An answer, or one item of an answer, that could not be given."""

    error: ApiError


LONGEST_MESSAGE = 300


def failed(code: ErrorCode, message: str, field: str | None = None) -> Failed:
    """An error in one line, whatever a request put into it."""
    return Failed(error=ApiError(code=code, message=_line(message), field=None if field is None else _line(field)))


def _line(text: str) -> str:
    line = " ".join(text[: 4 * LONGEST_MESSAGE].split()).encode("utf-8", "replace").decode()
    return line if len(line) <= LONGEST_MESSAGE else f"{line[: LONGEST_MESSAGE - 3]}..."


def within(failure: Failed, prefix: str) -> Failed:
    """The same failure with its field seen from the request: `items.3` and `layer` give `items.3.layer`."""
    field = failure.error.field
    return failed(failure.error.code, failure.error.message, prefix if field is None else f"{prefix}.{field}")


# --- models ----------------------------------------------------------------------------------------------------


class CoderInfo(_Api):
    name: str
    layer: int
    num_latents: int


class TargetInfo(_Api):
    name: str
    num_layers: int
    width: int
    coders: list[CoderInfo]


class ExplainerInfo(_Api):
    name: str
    target: str
    layers: list[int]
    """Layers of the target that it may be asked about."""
    tasks: list[TaskName]


class SimulatorInfo(_Api):
    name: str
    target: str
    """The target whose tokens it gives levels for."""


class PatchExample(_Api):
    kind: Literal["patch"] = "patch"
    text: str
    position: int
    source_text: str
    source_position: int
    layers: list[int]


class AblationExample(_Api):
    kind: Literal["ablate"] = "ablate"
    text: str
    span: list[int]


class Examples(_Api):
    """Requests that a page may offer."""

    texts: list[str] = []
    patches: list[PatchExample] = []
    ablations: list[AblationExample] = []


class Models(_Api):
    """GET /v1/models."""

    targets: list[TargetInfo]
    explainers: list[ExplainerInfo]
    simulators: list[SimulatorInfo]
    examples: Examples = Examples()


# --- activations -----------------------------------------------------------------------------------------------


class Token(_Api):
    """One token of a text: its position, and the characters `[start, end)` it stands for (none for begin-of-text)."""

    index: int
    text: str
    start: int
    end: int


class NextToken(_Api):
    text: str
    probability: float


class ActivationsRequest(_Api):
    """POST /v1/activations: what the target's residual stream holds at every token, and what it would say next."""

    target: Name
    text: Text
    layers: Indices | None = None
    """None: all."""
    positions: Indices | None = None
    """Of the vectors; none: all."""
    vectors: bool = False

    def texts(self) -> Iterator[tuple[str, str]]:
        yield "text", self.text


class Activations(_Api):
    tokens: list[Token]
    layers: list[int]
    norms: list[list[float]]
    """Euclidean norm of the residual vector at every token, one list per layer."""
    positions: list[int]
    """Positions of the vectors; empty where none are asked for."""
    vectors: str | None
    """Little-endian float32 [L, P, D] in base64."""
    next_tokens: list[NextToken]

    def array(self) -> Float[np.ndarray, "L P D"]:
        """The vectors. Only for an answer that has some."""
        assert self.vectors is not None, "no vectors were asked for"
        flat = np.frombuffer(base64.b64decode(self.vectors), dtype="<f4")
        return flat.reshape(len(self.layers), len(self.positions), -1)


def encoded_vectors(values: Float[np.ndarray, "L P D"]) -> str:
    return base64.b64encode(np.ascontiguousarray(values, dtype="<f4").tobytes()).decode("ascii")


# --- explain ---------------------------------------------------------------------------------------------------


class TokenItem(_Api):
    """The residual vector of a text at one layer and position."""

    kind: Literal["token"]
    text: Text
    layer: Index
    position: Index


class VectorItem(_Api):
    """A vector of the target's width, as it were at a layer."""

    kind: Literal["vector"]
    vector: Annotated[list[Number], Field(min_length=1, max_length=65536)]
    layer: Index


class LatentItem(_Api):
    """The feature vector (decoder row) of a latent."""

    kind: Literal["latent"]
    coder: Name
    latent: Index


ExplainItem: TypeAlias = Annotated[TokenItem | VectorItem | LatentItem, Field(discriminator="kind")]


class ExplainRequest(_Api):
    """POST /v1/explain: what do these vectors encode? Greedy; each item is answered or fails by itself."""

    explainer: Name
    items: Annotated[list[ExplainItem], Field(min_length=1)]
    max_new_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    """Longest answer; none takes the explainer's own."""

    def texts(self) -> Iterator[tuple[str, str]]:
        for number, item in enumerate(self.items):
            if isinstance(item, TokenItem):
                yield f"items.{number}.text", item.text


class Explanation(_Api):
    explanation: str
    query: str
    """The question's text, the vector left out."""
    layer: int


class Explanations(_Api):
    items: list[Explanation | Failed]


# --- what if ---------------------------------------------------------------------------------------------------


class PatchRequest(_Api):
    """The residual vector of another text, averaged over a block of layers, replaces that of the text in the block."""

    explainer: Name
    kind: Literal["patch"]
    text: Text
    position: Index
    source_text: Text
    source_position: Index
    layers: Annotated[list[Index], Field(min_length=2, max_length=2)]
    """First and last layer of the block."""

    def texts(self) -> Iterator[tuple[str, str]]:
        yield "text", self.text
        yield "source_text", self.source_text


class AblateRequest(_Api):
    """The characters `[start, end)` of the text are left out."""

    explainer: Name
    kind: Literal["ablate"]
    text: Text
    span: Annotated[list[Index], Field(min_length=2, max_length=2)]

    def texts(self) -> Iterator[tuple[str, str]]:
        yield "text", self.text


WhatIfRequest: TypeAlias = Annotated[PatchRequest | AblateRequest, Field(discriminator="kind")]


class Clean(_Api):
    token: str


class Truth(_Api):
    """What the target says under the intervention, and whether that differs from what it says without."""

    changed: bool
    content: str


class Prediction(_Api):
    """The explainer's answer; `changed` and `content` are null where it does not have the form of an answer."""

    changed: bool | None
    content: str | None
    text: str


class WhatIf(_Api):
    clean: Clean
    truth: Truth
    prediction: Prediction
    agrees: bool
    """Verdict and content are both right."""


# --- simulate and score ----------------------------------------------------------------------------------------


class SimulateItem(_Api):
    description: Text
    text: Text


class SimulateRequest(_Api):
    """POST /v1/simulate: how active would a latent with this description be on every token of the text?"""

    simulator: Name
    items: Annotated[list[SimulateItem], Field(min_length=1)]

    def texts(self) -> Iterator[tuple[str, str]]:
        yield from _item_texts(self.items)


class Simulated(_Api):
    tokens: list[Token]
    """The target's tokens of the text, begin-of-text left out."""
    activations: list[float]
    """Expected level in [0, 10] at each of these tokens."""


class Simulations(_Api):
    items: list[Simulated | Failed]


class ScoreLatentItem(_Api):
    """A description against a latent of the simulator's target."""

    description: Text
    text: Text
    coder: Name
    latent: Index


class ScoreActivationsItem(_Api):
    """A description against given activations, one per token without begin-of-text."""

    description: Text
    text: Text
    activations: Annotated[list[Number], Field(min_length=1, max_length=65536)]


class ScoreRequest(_Api):
    """POST /v1/score: does the description say where the activations are?"""

    simulator: Name
    items: Annotated[list[ScoreLatentItem | ScoreActivationsItem], Field(min_length=1)]

    def texts(self) -> Iterator[tuple[str, str]]:
        yield from _item_texts(self.items)


class Scored(_Api):
    correlation: float | None
    """Pearson's r of simulated and true activations over the tokens; null where it is not defined."""
    reason: str | None
    """Why it is not defined."""
    simulated: list[float]
    true: list[float]
    tokens: list[Token]


class Scores(_Api):
    items: list[Scored | Failed]


class Health(_Api):
    status: Literal["ok", "starting", "draining"]


def _item_texts(items: Any) -> Iterator[tuple[str, str]]:
    for number, item in enumerate(items):
        yield f"items.{number}.description", item.description
        yield f"items.{number}.text", item.text
