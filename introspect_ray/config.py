"""One validated, typed config per job: the only place where a default is written.

Every job takes `--config FILE.yaml` and `--section.field value` overrides; both end in one of the trees below.
Unknown keys and values out of range are refused here, before any model is touched. The resolved tree is saved beside
what the job writes, so that an output folder can say which config it belongs to.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

TaskName = Literal["feature_description", "activation_patching", "input_ablation"]
Method = Literal[
    "explainer",
    "majority",
    "nearest_neighbor",
    "zero_shot",
    "no_vector",
    "zero_vector",
    "swapped_vector",
    "self_scales",
]
GpuName = Literal["A10G-24", "A100-40", "A100-80", "B200-180", "H100-80", "H200-141", "L4-24", "L40S-48", "RTX4090-24"]
KnownModel = Literal["llama-3.1-8b", "llama-3-8b", "llama-3.1-8b-instruct", "qwen3-8b", "llama-3.1-70b"]
HUB_IDS: dict[KnownModel, str] = {
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama-3.1-8b-instruct": "meta-llama/Llama-3.1-8B-Instruct",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "llama-3.1-70b": "meta-llama/Llama-3.1-70B",
}
"""Models whose shape ships with the package (models/shapes.py)."""
Fraction = Annotated[float, Field(ge=0, le=1)]


def _slots(*names: str) -> AfterValidator:
    """A layout must have each of these slots exactly once."""

    def check(layout: str) -> str:
        for name in names:
            if layout.count(name) != 1:
                raise ValueError(f"needs {name} exactly once, found {layout.count(name)} in {layout!r}")
        return layout

    return AfterValidator(check)


class Config(BaseModel):
    """A node of a config tree: immutable, and closed to keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _sections_given_in_part(cls, tree: Any) -> Any:
        """A section of which only some keys are given keeps the others of its own default, not of its class."""
        if not isinstance(tree, dict):
            return tree
        defaults = {name: field.default for name, field in cls.model_fields.items()}
        return {name: _over(defaults.get(name), value) for name, value in tree.items()}

    def fingerprint(self) -> str:
        """16 hex digits that are equal for equal resolved trees, on any machine."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _over(default: Any, given: Any) -> Any:
    """`given` with every key that it lacks taken from the default section, at any depth."""
    if not (isinstance(default, Config) and isinstance(given, dict)):
        return given
    own = {name: getattr(default, name) for name in type(default).model_fields}
    return own | {name: _over(own.get(name), value) for name, value in given.items()}


class ModelConfig(Config):
    """A causal language model, by folder, by hub id, or `pocket:target_a` / `pocket:target_b`."""

    path: str = "pocket:target_a"
    """Folder, hub id, or `pocket:NAME` for a model that ships with the package."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Dtype of the weights in memory; `auto` takes the checkpoint's."""
    device: str = "auto"
    """`auto` takes a GPU if the process has one, else the CPU."""
    quantization: Literal["none", "nf4", "nf4_double"] = "none"
    """`nf4` keeps the weights of linear layers in 4 bits (bitsandbytes) and computes in `dtype`; `nf4_double` quantizes
    their scales as well."""
    device_map: Literal["none", "auto", "balanced", "sequential"] = "none"
    """How layers spread over the GPUs of one process when one does not hold the model (accelerate); `none` uses one."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation of transformers."""
    revision: str | None = None
    """Revision of a hub model."""
    trust_remote_code: bool = False
    """Run code that a checkpoint brings along."""

    @model_validator(mode="after")
    def _one_placement(self) -> Self:
        if self.device_map != "none" and self.device != "auto":
            raise ValueError(f"device_map {self.device_map} chooses devices itself: found device {self.device}")
        return self


class SourceConfig(Config):
    """Where the rows come from that a task turns into records."""

    path: str = "pocket"
    """`pocket` for the embedded world, else a file (json, jsonl, csv, parquet, txt; local or any fsspec URL), a folder
    of files of one kind, or a glob such as `s3://bucket/facts/*.parquet`; rows count on in order of the names."""
    format: Literal["auto", "counterfact", "known_facts", "mmlu", "marked_text", "latent_labels", "text"] = "auto"
    """Row format; `auto` reads it off the columns."""
    text_unit: Literal["auto", "paragraph", "line", "file"] = "auto"
    """What one text of a txt file is; `auto`: paragraphs where blank lines part them, else lines."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Use at most so many source rows, taken in file order."""


class SplitConfig(Config):
    """Shares of the groups (subjects, questions, latents) per split; a stable hash of the group key decides."""

    train: Fraction = 0.7
    validation: Fraction = 0.05
    test: Fraction = 0.25
    salt: str = "introspect_ray"
    """Another salt gives another, equally stable assignment."""

    @model_validator(mode="after")
    def _sums_to_one(self) -> Self:
        total = self.train + self.validation + self.test
        if abs(total - 1) > 1e-6:
            raise ValueError(f"train + validation + test must be 1, found {total:g}")
        return self


class FeatureDescriptionConfig(Config):
    """Task 1: which latents, and their descriptions."""

    sae: str = "pocket:sae"
    """Folder of a sae-lens SAE or transcoder whose decoder rows are the vectors, or `pocket:sae`."""
    minimum_score: Fraction = 0.7
    """Latents whose best label scores lower are left out, counted as `label_score_too_low`."""
    question: Annotated[str, _slots("{vector}")] = "At layer {layer}, {vector} encodes what?"
    """Layout of the query; `{vector}` is where the vector stands, `{layer}` the number of its layer."""


POCKET_FEATURES = FeatureDescriptionConfig(question="The note says{vector}. Which word is it?")
"""A question that the pocket targets have heard about words: models of this size do not learn to copy from a few
hundred examples, and one that already reads a word off its embedding need only learn to read it off a vector."""


class ActivationPatchingConfig(Config):
    """Task 2: P1 section 2.3."""

    num_blocks: Annotated[int, Field(ge=1)] = 4
    """The target's layers are cut into so many equal blocks of consecutive layers."""
    num_options: Annotated[int, Field(ge=2, le=26)] = 6
    """Answer options named in the prompt, the two true ones included."""
    instruction: Annotated[str, _slots("{options}")] = "\nRespond with one of {options} and nothing else.\nAnswer:"
    """Follows the factual prompt; `{options}` becomes `X or Y or ...`."""
    pairs_per_subject: Annotated[int, Field(ge=1)] = 3
    """Counterfactual partners per prompt."""
    subjects_per_group: Annotated[int, Field(ge=2)] = 4
    """Validation and test subjects are paired only within groups of this size, so that groups are independent."""
    balance: bool = True
    """Select equally many changed and unchanged records per (block, kind of position) for training and evaluation."""
    majority_floor: Fraction = 0.03
    """Share of the larger class that a (block, kind) cell keeps where the smaller one has fewer records, so that no
    cell is lost because nothing ever changes there."""


class InputAblationConfig(Config):
    """Task 3: multiple-choice questions with a hint."""

    answer: Literal["letter", "text"] = "letter"
    """How the target answers: by an option's letter (P1), or by its text where that is a single token."""
    question: Annotated[str, _slots("{question}", "{options}", "{hint}")] = "{question}\n{options}{hint}\nAnswer:"
    """Layout of the prompt; `{options}` holds all options, `{hint}` is where the hint stands."""
    option: Annotated[str, _slots("{choice}")] = "{letter}. {choice}"
    """Layout of one option."""
    separator: str = "\n"
    """Between two options."""
    hint: Annotated[str, Field(min_length=1)] = "\nHint: {letter}"
    """Wording of the span that is ablated; `{letter}` and `{choice}` are the hinted option's."""
    policy: Literal["random", "wrong", "correct"] = "random"
    """Which option a hint names."""


POCKET_QUESTIONS = InputAblationConfig(
    answer="text",
    question="{question}\nChoose {options}.{hint}\nAnswer:",
    option="{choice}",
    separator=" or ",
    hint="\nHint: {choice}",
)
"""What the pocket targets were trained on: models of this size bind a word, not a letter, to an answer."""


class ActorConfig(Config):
    """The pool of Ray actors that hold a model."""

    min_size: Annotated[int, Field(ge=1)] = 1
    initial_size: Annotated[int, Field(ge=1)] = 1
    max_size: Annotated[int, Field(ge=1)] = 1
    num_cpus: Annotated[float, Field(ge=0)] = 1
    num_gpus: Annotated[float, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.min_size <= self.initial_size <= self.max_size:
            raise ValueError(
                "sizes must satisfy min_size <= initial_size <= max_size, "
                f"found {self.min_size}, {self.initial_size}, {self.max_size}"
            )
        return self


class GenerateConfig(Config):
    """jobs/generate_dataset.py: run one task's procedure on a target and write a sharded dataset."""

    task: TaskName = "activation_patching"
    output: str = "runs/dataset"
    """Dataset folder (any fsspec URL)."""
    target: ModelConfig = ModelConfig()
    source: SourceConfig = SourceConfig()
    split: SplitConfig = SplitConfig()
    feature_description: FeatureDescriptionConfig = FeatureDescriptionConfig()
    activation_patching: ActivationPatchingConfig = ActivationPatchingConfig()
    input_ablation: InputAblationConfig = InputAblationConfig()
    actors: ActorConfig = ActorConfig()
    items_per_shard: Annotated[int, Field(ge=1)] = 256
    """Work items (prompt pairs, questions, latents) per shard: the unit that is written, skipped and redone."""
    vector_dtype: Literal["float16", "float32"] = "float16"
    """Dtype of vectors on disk."""
    max_failed_share: Fraction = 0.98
    """The run fails if a larger share of its records ends with a reason instead of a truth."""
    max_error_share: Fraction = 0.05
    """The run fails if the procedure raised, or ended its process, for a larger share of its work items: that is a
    defect or a broken device, while other reasons are truths that do not exist."""
    seed: int = 0

    @model_validator(mode="after")
    def _gpus_to_spread_over(self) -> Self:
        if self.target.device_map != "none" and not self.actors.num_gpus:
            raise ValueError(
                f"target.device_map {self.target.device_map} spreads layers over the GPUs of an actor:"
                " set actors.num_gpus, found 0"
            )
        return self


class InspectConfig(Config):
    """jobs/inspect_dataset.py: verify and summarise a finished dataset."""

    dataset: str = "runs/dataset"
    """Dataset folder (any fsspec URL); may stand alone, without `--dataset`."""
    page: str | None = None
    """HTML page to write (any fsspec URL); none writes `inspection.html` into the dataset folder."""
    num_examples: Annotated[int, Field(ge=0)] = 4
    """Records of every split that the page shows."""


class ConvertConfig(Config):
    """jobs/convert_dataset.py: between our datasets and the layouts that P1 published."""

    action: Literal["to_published", "from_published", "pickles"] = "to_published"
    """`to_published`: a dataset as published Parquet files; `from_published`: such files as a dataset; `pickles`:
    published pickles, or a tar of them, as safetensors and Parquet."""
    source: str = "runs/dataset"
    """What is converted: a folder, or for pickles a file (any fsspec URL)."""
    output: str = "runs/converted"
    """A new folder (any fsspec URL)."""
    target: ModelConfig = ModelConfig()
    """The model that the records are about; only its tokenizer and config are read."""
    records_per_shard: Annotated[int, Field(ge=1)] = 4096
    """Records of one shard, or of one published file; so many are in memory at once."""
    vector_dtype: Literal["float16", "float32"] = "float16"
    """Dtype of vectors in such a dataset."""


class LoraConfig(Config):
    """Low-rank adapters; P1 patching defaults."""

    rank: Annotated[int, Field(ge=1)] = 128
    alpha: Annotated[float, Field(gt=0)] = 16
    dropout: Fraction = 0.1
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class ExplainerConfig(Config):
    """What an explainer starts from and how vectors enter it."""

    model: ModelConfig = ModelConfig()
    projection: Literal["auto", "none", "linear"] = "auto"
    """`auto`: a linear map per target layer where the widths differ, none where they are equal."""
    vector_scale: Annotated[float, Field(gt=0)] | None = None
    """Scale every projected vector to this multiple of the mean token-embedding norm; none leaves it as it is."""
    soft_tokens: Annotated[float, Field(gt=0)] | None = None
    """Replace every projected vector by a mixture of token embeddings, weighted by softmax of this factor times the
    cosine to each; none leaves it as it is. An explainer reads embeddings well that it saw in all its training."""
    fitted_projection: str | None = None
    """Folder that fit_projection.py wrote; the linear maps start from it instead of the identity or chance."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 24
    """Longest answer that is generated."""

    @model_validator(mode="after")
    def _fit_is_used(self) -> Self:
        if self.fitted_projection is not None and self.projection == "none":
            raise ValueError("fitted_projection needs projection linear or auto, found none")
        if self.soft_tokens is not None and self.vector_scale is not None:
            raise ValueError(
                "soft_tokens and vector_scale exclude each other: a mixture of embeddings has its own length"
            )
        return self


class FitProjectionConfig(Config):
    """jobs/fit_projection.py: fit the map from the target's residual stream to the explainer's input embeddings."""

    output: str = "runs/projection"
    target: ModelConfig = ModelConfig()
    explainer: ModelConfig = ModelConfig()
    """The model that the explainer starts from."""
    source: SourceConfig = SourceConfig(limit=4000)
    """Texts: rows with a field `text`, or `pocket`."""
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Layers of the target to fit; none fits all."""
    ridge: Annotated[float, Field(gt=0)] = 1e-3
    """Penalty, relative to the mean squared entry of the residual vectors."""
    hold_out_every: Annotated[int, Field(ge=2)] = 10
    """Every so many-th text is not fitted on; the share of variance explained is measured there."""


class OptimizationConfig(Config):
    """AdamW with linear warm-up and a constant or cosine rate afterwards."""

    steps: Annotated[int, Field(ge=1)] = 600
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the training records, in place of `steps`; none takes `steps`."""
    batch_size: Annotated[int, Field(ge=1)] = 64
    """Examples per optimizer step, over all workers."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup_share: Fraction = 0.1
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0


class TrainerConfig(Config):
    """Ray Train: workers, checkpoints, recovery."""

    num_workers: Annotated[int, Field(ge=1)] = 1
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0
    checkpoint_every: Annotated[int, Field(ge=1)] = 200
    """Optimizer steps between checkpoints."""
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    """Newest checkpoints that stay; at least two, so that the newest is never the only one."""
    log_every: Annotated[int, Field(ge=1)] = 10
    """Optimizer steps between lines of metrics.jsonl."""
    micro_batch_tokens: Annotated[int, Field(ge=1)] = 1024
    """Largest size of one forward pass on one worker, padding included; more is faster on a GPU, less on a CPU."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Worker failures that are recovered from before the run fails; a new checkpoint starts the count anew."""
    sharding: Literal["none", "fsdp2"] = "none"
    """`fsdp2` shards weights, gradients and optimizer state per decoder layer over the workers; `none` keeps a whole
    copy on each."""
    activation_checkpointing: bool = False
    """Recompute each decoder layer in the backward pass instead of keeping what it computed."""
    packing: bool = True
    """Put several examples into one row with attention kept apart, instead of padding them to one length."""
    compile: bool = False
    """torch.compile of every decoder layer."""
    min_workers: Annotated[int, Field(ge=1)] | None = None
    """Go on with fewer workers, down to so many, when the cluster has lost some; none waits for all of them."""
    compute_dtype: Literal["model", "bfloat16"] = "model"
    """`bfloat16`: master weights in the model's dtype, computation in bfloat16, gradients summed in float32."""

    @model_validator(mode="after")
    def _bounds_in_order(self) -> Self:
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError(f"min_workers is {self.min_workers}, expected at most num_workers {self.num_workers}")
        return self


class EvaluationDuringConfig(Config):
    """Evaluation on held-out groups while training."""

    every: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps between evaluations on the validation split; 0 does none."""
    max_examples: Annotated[int, Field(ge=1)] = 200
    """Records per dataset, spread evenly over the groups."""
    metric: str = "exact_match"
    """What `patience` watches and the best checkpoint is kept by, averaged over the datasets that have it."""
    patience: Annotated[int, Field(ge=1)] | None = None
    """Stop after so many evaluations without a better one; none never stops early."""


class LoggingConfig(Config):
    """Where metrics go beside metrics.jsonl."""

    tensorboard: bool = True
    """Event files under the output folder's `tensorboard/`."""
    wandb_project: str | None = None
    """Weights & Biases project; none logs nothing there."""
    mlflow_uri: str | None = None
    """MLflow tracking server or folder; none logs nothing there."""


class PlanConfig(Config):
    """`--plan`: what a run needs, worked out from its config without weights, is printed in place of the run."""

    show: bool = False
    """Print the plan and stop; `--plan` alone says the same."""
    gpu: GpuName = "H100-80"
    """GPU that memory and time are worked out for; its number is `trainer.num_workers`."""
    gpus_per_node: Annotated[int, Field(ge=1)] = 8
    usable_share: Annotated[float, Field(gt=0, le=1)] = 0.92
    """Share of a GPU's memory that tensors may take; the rest is for the CUDA context, communication buffers and holes
    between tensors."""
    share_of_peak: Annotated[float, Field(gt=0, le=1)] = 0.35
    """Share of the GPU's peak arithmetic that matrix products reach."""
    node_gbit_per_s: Annotated[float, Field(gt=0)] = 400
    """Network of one node."""
    task: TaskName = "feature_description"
    """Whose lengths are assumed where the datasets are not there yet."""
    num_examples: Annotated[int, Field(ge=1)] | None = None
    """Training records where the datasets are not there yet; none assumes the task's number in P1."""
    target: str | None = None
    """Model that the vectors come from where the datasets are not there yet; none: the explainer's own."""


class TrainConfig(Config):
    """jobs/train_explainer.py: fine-tune an explainer on datasets that generate_dataset.py wrote."""

    datasets: tuple[str, ...] = ("runs/dataset",)
    """Dataset folders; their records are mixed in proportion to their size, or by `weights`."""
    output: str = "runs/explainer"
    explainer: ExplainerConfig = ExplainerConfig()
    weights: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    """How often each dataset is drawn from, in relation to the others; none draws every record equally often."""
    method: Literal["full", "lora", "qlora"] = "full"
    """`qlora`: adapters on a base in 4 bits (NF4 with double quantisation)."""
    lora: LoraConfig = LoraConfig()
    optimization: OptimizationConfig = OptimizationConfig()
    trainer: TrainerConfig = TrainerConfig()
    evaluation: EvaluationDuringConfig = EvaluationDuringConfig()
    logging: LoggingConfig = LoggingConfig()
    plan: PlanConfig = PlanConfig()
    seed: int = 0

    @model_validator(mode="after")
    def _one_weight_per_dataset(self) -> Self:
        if self.weights is not None and len(self.weights) != len(self.datasets):
            raise ValueError(f"weights has {len(self.weights)} numbers for {len(self.datasets)} datasets")
        return self


class EvaluationRun(Config):
    """One dataset's test split, answered by the explainer trained for it."""

    dataset: str = "runs/dataset"
    explainer: str = "runs/explainer"
    name: Annotated[str, Field(pattern=r"^\w[\w .+()-]{0,39}$")] | None = None
    """What scores and report call the explainer. Several explainers of one dataset stand side by side; the first is
    the one that controls and breakdowns are of, the others need names."""


class EvaluateConfig(Config):
    """jobs/evaluate_explainer.py: answers, baselines, controls, scores.json and report.html."""

    runs: tuple[EvaluationRun, ...] = (EvaluationRun(),)
    output: str = "runs/evaluation"
    methods: tuple[Method, ...] = get_args(Method)
    """Methods that do not apply to a task (a vector control where no vector exists) are left out there."""
    scales: tuple[float, ...] = (1.0, 5.0, 10.0, 25.0, 50.0)
    """Norms at which `self_scales` asks the untrained model (P1: SelfIE, best of these)."""
    max_examples: Annotated[int, Field(ge=1)] | None = None
    """Score at most so many records per dataset, spread evenly over the groups; none scores the whole split."""
    batch_size: Annotated[int, Field(ge=1)] = 128
    bootstrap_samples: Annotated[int, Field(ge=100)] = 2000
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    num_browsable: Annotated[int, Field(ge=0)] = 200
    """Examples per task that the report lets a reader browse."""
    actors: ActorConfig = ActorConfig()
    seed: int = 0

    @model_validator(mode="after")
    def _names_tell_apart(self) -> Self:
        if not self.runs:
            raise ValueError("runs is empty, expected at least one")
        seen: dict[str, list[str | None]] = {}
        for run in self.runs:
            others = seen.setdefault(run.dataset, [])
            if run.name in get_args(Method):
                raise ValueError(f"runs: name {run.name!r} is that of a method: choose another")
            if others and run.name is None:
                raise ValueError(f"runs: dataset {run.dataset} has several explainers: name each after the first")
            if run.name in others and run.name is not None:
                raise ValueError(f"runs: dataset {run.dataset} has two explainers with the name {run.name!r}")
            others.append(run.name)
        return self


class ExportConfig(Config):
    """jobs/export_explainer.py: an explainer for others to load, ours or one that P1 published."""

    explainer: str = "runs/explainer"
    """Folder (any fsspec URL, `hf://OWNER/NAME` for one of the hub)."""
    output: str = "runs/exported"
    """A new folder (any fsspec URL)."""
    merge: bool = False
    """Add an adapter to the weights that it adapts, so that no base model is needed."""
    evaluation: str | None = None
    """Folder that evaluate_explainer.py wrote; its scores go into the model card."""
    device: str = "cpu"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the weights in memory and in the output; `auto` takes the checkpoint's."""
    target: str | None = None
    """Published checkpoints: the model that is explained, where their name does not say it."""
    base: str | None = None
    """Published adapters: the model that they belong to, where the name that they say leads nowhere."""
    alignment: str | None = None
    """Published checkpoints without projections: file with keys alignments.LAYER.weight."""


class PocketTargetConfig(Config):
    """Shape and training of one pocket target."""

    architecture: Literal["llama", "qwen3"]
    layers: Annotated[int, Field(ge=1)]
    width: Annotated[int, Field(ge=8)]
    mlp_width: Annotated[int, Field(ge=8)]
    heads: Annotated[int, Field(ge=1)]
    steps: Annotated[int, Field(ge=1)] = 2600
    rows: Annotated[int, Field(ge=1)] = 32
    row_length: Annotated[int, Field(ge=16)] = 96
    learning_rate: Annotated[float, Field(gt=0)] = 3e-3
    checkpoint_every: Annotated[int, Field(ge=1)] = 250


class PocketSparseConfig(Config):
    """The pocket target's SAE and skip transcoder: where they read, their size, training, and labels."""

    sae_layer: Annotated[int, Field(ge=0)] = 1
    """Decoder layer whose residual output the SAE reads."""
    sae_latents: Annotated[int, Field(ge=1)] = 1536
    sae_active: Annotated[int, Field(ge=1)] = 8
    """Mean number of active latents per token."""
    transcoder_layer: Annotated[int, Field(ge=0)] = 1
    """Decoder layer whose MLP the transcoder stands for."""
    transcoder_latents: Annotated[int, Field(ge=1)] = 1024
    transcoder_active: Annotated[int, Field(ge=1)] = 8
    documents: Annotated[int, Field(ge=1)] = 12000
    """Documents of each of three samples: to train on, to choose labels on, to score labels on."""
    rows_per_word: Annotated[int, Field(ge=1)] = 200
    """Tokens of one word that train the coders at most; names are rare and would get no latents otherwise."""
    steps: Annotated[int, Field(ge=1)] = 2000
    batch_size: Annotated[int, Field(ge=1)] = 512
    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    dead_after: Annotated[int, Field(ge=1)] = 100
    """Steps without firing after which a latent is trained on what the others leave over."""
    longest: Annotated[float, Field(gt=0)] = 2
    """Vectors longer than this multiple of the median are attention sinks and left out of labelling."""
    active_share: Fraction = 0.5
    """A latent counts as firing where its activation exceeds this share of its largest one."""
    minimum_firings: Annotated[int, Field(ge=1)] = 20
    """Latents that fire on fewer tokens of the sample count as dead and get no label."""
    minimum_tokens: Annotated[int, Field(ge=1)] = 10
    """Categories with fewer tokens in the sample describe nothing."""
    margin: Fraction = 0.03
    """The simplest category within this distance of the best F1 becomes the label."""
    accepted_score: Fraction = 0.7
    """F1 from which a description is accepted as right."""


class QuickstartTask(Config):
    """One task of the quickstart: its source and how long its explainer trains."""

    source: SourceConfig = SourceConfig()
    explainer: ExplainerConfig = ExplainerConfig()
    fit_projection: bool = False
    """Start the explainer's projections from maps fitted on plain text (see FitProjectionConfig)."""
    optimization: OptimizationConfig = OptimizationConfig()


class QuickstartConfig(Config):
    """jobs/quickstart.py: generate, train, evaluate and report for every task, on the pocket world by default."""

    output: str = "runs/quickstart"
    """Folder with `datasets/TASK`, `projections/TASK`, `explainers/TASK` and `evaluation`."""
    tasks: tuple[TaskName, ...] = ("feature_description", "activation_patching", "input_ablation")
    target: ModelConfig = ModelConfig()
    feature_description: QuickstartTask = QuickstartTask(
        explainer=ExplainerConfig(soft_tokens=30.0),
        fit_projection=True,
        optimization=OptimizationConfig(steps=120, learning_rate=1.5e-4),
    )
    activation_patching: QuickstartTask = QuickstartTask(
        explainer=ExplainerConfig(vector_scale=2.0),
        fit_projection=True,
        optimization=OptimizationConfig(steps=500),
    )
    input_ablation: QuickstartTask = QuickstartTask(optimization=OptimizationConfig(steps=500))
    features: FeatureDescriptionConfig = POCKET_FEATURES
    """Latents and layout of the queries of feature_description."""
    pairs: ActivationPatchingConfig = ActivationPatchingConfig(pairs_per_subject=6)
    """Prompt pairs of activation_patching."""
    questions: InputAblationConfig = POCKET_QUESTIONS
    """Layout of the questions of input_ablation."""
    texts: SourceConfig = FitProjectionConfig().source
    """Plain texts that projections are fitted on."""
    actors: ActorConfig = ActorConfig(initial_size=2, max_size=2)
    trainer: TrainerConfig = TrainerConfig(cpus_per_worker=2)
    max_examples: Annotated[int, Field(ge=1)] | None = 1000
    """Test records scored per task, spread evenly over the groups."""
    seed: int = 0


class BuildPocketConfig(Config):
    """jobs/build_pocket.py: the pocket world's tokenizer, targets, SAE and transcoder."""

    output: str = "introspect_ray/pocket/artifacts"
    work: str = "runs/build_pocket"
    """Checkpoints and the tokenizer; may be deleted when the build is done."""
    vocabulary_size: Annotated[int, Field(ge=300)] = 2048
    target_a: PocketTargetConfig = PocketTargetConfig(architecture="llama", layers=4, width=160, mlp_width=448, heads=5)
    target_b: PocketTargetConfig = PocketTargetConfig(architecture="qwen3", layers=6, width=128, mlp_width=384, heads=4)
    sparse: PocketSparseConfig = PocketSparseConfig()
    threads: Annotated[int, Field(ge=1)] = 1
    """CPU threads of torch; another number changes the order of sums, and so the last digits of the weights."""
    seed: int = 0


def resolved(config: Config) -> dict[str, Any]:
    """The whole tree as JSON types, every default written out."""
    return config.model_dump(mode="json")


def differences(there: dict[str, Any], here: dict[str, Any], prefix: str = "") -> list[str]:
    """What two resolved trees disagree about, one phrase per key."""
    found: list[str] = []
    for name in {**there, **here}:
        one, other = there.get(name), here.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            found += differences(one, other, f"{prefix}{name}.")
        elif one != other:
            found.append(f"{prefix}{name} is {one!r} there, {other!r} here")
    return found
