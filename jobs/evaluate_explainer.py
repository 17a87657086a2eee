"""Evaluate explainers on held-out groups, beside every baseline and control, and write scores.json and report.html.

Each run pairs a dataset (from generate_dataset.py) with the explainer trained on it (from train_explainer.py):
    --runs '[{dataset: runs/dataset, explainer: runs/explainer}]'
"""

from tqdm import tqdm

from introspect_ray.cli import run_job
from introspect_ray.config import EvaluateConfig
from introspect_ray.data.evaluate import EvaluationSummary, evaluate_explainer


def evaluate(config: EvaluateConfig) -> EvaluationSummary:
    """Evaluate with a progress bar."""
    with tqdm(desc="answers", unit="answer", mininterval=2) as bar:

        def progress(task: str, count: int) -> None:
            bar.set_description(f"answers, {task}", refresh=False)
            bar.update(count)

        return evaluate_explainer(config, progress)


def main(config: EvaluateConfig) -> None:
    summary = evaluate(config)
    print(summary.table)
    print(f"wrote {summary.scores} and {summary.report}")


if __name__ == "__main__":
    run_job(EvaluateConfig, main, __doc__)
