"""Evaluate explainers on held-out groups, beside every baseline and control, and write scores.json and report.html.

Each run pairs a dataset (from generate_dataset.py) with the explainer trained on it (from train_explainer.py):
    --runs '[{dataset: runs/dataset, explainer: runs/explainer}]'
Run the same command again to go on after a stop: answers that are there are kept.
"""

from introspect_ray.cli import progress_bar, run_job
from introspect_ray.config import EvaluateConfig


def evaluate(config: EvaluateConfig) -> str:
    """Evaluate with a progress bar; the table of scores and one line about what was written."""
    from introspect_ray.training.evaluate import (
        evaluate_explainer,  # Ray and torch load only after the config is checked
    )

    with progress_bar("evaluate", "answer") as show:
        return evaluate_explainer(config, show).text


def main(config: EvaluateConfig) -> None:
    print(evaluate(config))


if __name__ == "__main__":
    run_job(EvaluateConfig, main, __doc__)
