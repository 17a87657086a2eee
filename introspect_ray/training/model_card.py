"""README.md of an explainer: what it explains, what it was trained on, what it scores, and how to load it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from introspect_ray.evaluation.scores import format_value
from introspect_ray.explainer.card import ExplainerCard

Scores = Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]]
"""The contents of scores.json: task -> method -> metric -> value, low, high, n."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PAPER = "[arXiv 2511.08579](https://arxiv.org/abs/2511.08579)"


def readme(
    card: ExplainerCard,
    training: Mapping[str, Any] | None,
    scores: Scores | None = None,
    own: Mapping[str, str] | None = None,
) -> str:
    """The model card as Markdown.

    Args:
        training: the contents of training.json; absent for an explainer that was trained elsewhere.
        scores: of an evaluation on held-out groups.
        own: the method that this explainer is in them, by task.
    """
    target = card.target
    parts = [
        _header(card),
        f"# Explainer of {_plain(target.path)}",
        f"A language model that answers questions about the computations of **{_plain(target.path)}**: it reads vectors"
        " of that model's residual stream as continuous tokens, and was fine-tuned on what interventions on the model"
        f" gave. Method: *Training Language Models to Explain Their Own Computations* ({_PAPER}).",
        _table(("", ""), _facts(card, training)),
    ]
    if training is not None:
        parts += ["## Datasets", _datasets(training)]
        parts += _validation(training)
    for task, methods in (scores or {}).items():
        parts += [
            f"## Scores: {task}",
            f"On held-out groups, with intervals over groups. This explainer is `{(own or {})[task]}`; vectors are"
            " removed, zeroed or swapped for the explainer of the first row.",
            _scores_table(methods),
        ]
    parts += ["## How to load", _loading(card)]
    return "\n\n".join(parts) + "\n"


def _header(card: ExplainerCard) -> str:
    """The lines that the Hugging Face hub reads; a base model only where it is one of the hub."""
    lines = ["---", f"library_name: {'peft' if card.weights == 'lora' else 'transformers'}"]
    if _HUB_ID.fullmatch(card.base.path) and not Path(card.base.path).exists():
        lines.append(f"base_model: {card.base.path}")
    return "\n".join([*lines, "pipeline_tag: text-generation", "tags: [introspect_ray, explainer]", "---"])


def _facts(card: ExplainerCard, training: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    target = card.target
    facts = [
        ("Target", f"{_plain(target.path)}, {target.num_layers} layers of width {target.width}"),
        ("Starts from", _plain(card.base.path)),
        ("Weights", "LoRA adapter (PEFT), without embeddings" if card.weights == "lora" else "full"),
    ]
    fitted = training is not None and training["config"]["explainer"]["fitted_projection"] is not None
    start = ", started from a fitted map" if fitted else ""
    facts.append(("Vectors", "as they are" if card.projection == "none" else f"a linear map per target layer{start}"))
    if training is not None:
        config, results = training["config"], training["results"]
        optimization = config["optimization"]
        facts.append(
            (
                "Training",
                f"{config['method']}, {optimization['steps']} steps of {optimization['batch_size']} examples planned, "
                f"learning rate {optimization['learning_rate']:g} ({optimization['schedule']}), seed {config['seed']}",
            )
        )
        if "step" in results:
            facts.append(("Steps done", f"{results['step']}, loss {results['loss']:.4f} nats per answer token"))
        if "exported_step" in results:
            facts.append(("Weights are of", _exported(results, config["evaluation"]["metric"])))
        facts.append(("Run", f"`{training['run_key']}`"))
    return facts


def _exported(results: Mapping[str, Any], metric: str) -> str:
    """Which step's weights these are, and why."""
    step, best = results["exported_step"], results["best_step"]
    value = results["exported_scores"].get(metric)
    shown = "n/a" if value is None else format_value(value)
    if step == best:
        return f"step {step}, the best by {metric} ({shown})"
    return f"step {step} ({metric} {shown}); those of the best, step {best}, were lost with their checkpoint"


def _datasets(training: Mapping[str, Any]) -> str:
    rows = [
        (_plain(each["url"]), each["task"], str(each["num_train"]), str(each["num_validation"]), f"`{each['run_key']}`")
        for each in training["datasets"]
    ]
    return _table(("dataset", "task", "training records", "validation records", "identity"), rows)


def _validation(training: Mapping[str, Any]) -> list[str]:
    """Scores that training itself measured, of the weights that were exported."""
    scores = training["results"].get("exported_scores")
    if not scores:
        return []
    rows = [(name, "n/a" if value is None else format_value(value)) for name, value in scores.items()]
    return ["## Scores on the validation split", _table(("metric", "value"), rows)]


def _scores_table(methods: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    metrics = list(next(iter(methods.values())))

    def cell(score: Mapping[str, Any]) -> str:
        value, low, high = (float("nan") if score[key] is None else score[key] for key in ("value", "low", "high"))
        return f"{format_value(value)} [{format_value(low)}, {format_value(high)}]"

    rows = [(method, *(cell(scores[metric]) for metric in metrics)) for method, scores in methods.items()]
    return _table(("method", *metrics), rows)


def _loading(card: ExplainerCard) -> str:
    base = f" It needs its base model, {_plain(card.base.path)}." if card.weights == "lora" else ""
    return (
        "```python\n"
        "from introspect_ray.explainer.model import Explainer\n"
        "from introspect_ray.explainer.query import Query, Vector\n\n"
        f'explainer = Explainer.load("FOLDER", device="auto", dtype={json.dumps(card.base.dtype)})\n'
        f'query = Query(("At layer 1, ", Vector(values, layers=(1,)), " encodes what?"))'
        f"  # values: {card.target.width} numbers\n"
        "print(explainer.explain([query], batch_size=1))\n"
        "```\n\n"
        f"`explainer.json` holds what weights and tokenizer do not say, `projections.safetensors` the maps.{base}"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _plain(text: str) -> str:
    """Text of others in one line, without what Markdown would take for markup."""
    return re.sub(r"([\\`*<>\[\]])", r"\\\1", " ".join(text.split()))
