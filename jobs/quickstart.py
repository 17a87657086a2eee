"""The whole idea in one command: interventions make ground truth, an explainer learns it, a report says how well.

For every task: generate a dataset on the target (Ray Data), train an explainer that starts from the target's weights
(Ray Train), then evaluate all of them beside every baseline and control.
Stop it at any moment; the same command goes on.
"""

import time

from evaluate_explainer import evaluate
from fit_projection import fit
from generate_dataset import generate
from train_explainer import train

from introspect_ray.cli import run_job
from introspect_ray.config import (
    EvaluateConfig,
    EvaluationRun,
    FitProjectionConfig,
    GenerateConfig,
    QuickstartConfig,
    QuickstartTask,
    TaskName,
    TrainConfig,
)


def main(config: QuickstartConfig) -> None:
    from introspect_ray.data.cluster import connect  # Ray loads only after the config is checked

    started = time.monotonic()
    with connect():
        for task in config.tasks:
            say(f"{task}: generate")
            print(generate(generate_config(config, task)), flush=True)
        for task in config.tasks:
            if of_task(config, task).fit_projection:
                say(f"{task}: fit the projection")
                print(fit(fit_config(config, task)), flush=True)
            say(f"{task}: train")
            print(train(train_config(config, task)), flush=True)
        say("evaluate")
        text = evaluate(evaluate_config(config))
    print(f"\nfinished in {(time.monotonic() - started) / 60:.1f} min\n\n{text}")


def say(stage: str) -> None:
    print(f"\n== {stage}", flush=True)


def generate_config(config: QuickstartConfig, task: TaskName) -> GenerateConfig:
    return GenerateConfig(
        task=task,
        output=f"{config.output}/datasets/{task}",
        target=config.target,
        source=of_task(config, task).source,
        feature_description=config.features,
        activation_patching=config.pairs,
        input_ablation=config.questions,
        actors=config.actors,
        seed=config.seed,
    )


def fit_config(config: QuickstartConfig, task: TaskName) -> FitProjectionConfig:
    return FitProjectionConfig(
        output=f"{config.output}/projections/{task}",
        target=config.target,
        explainer=of_task(config, task).explainer.model,
        source=config.texts,
    )


def train_config(config: QuickstartConfig, task: TaskName) -> TrainConfig:
    explainer = of_task(config, task).explainer
    if of_task(config, task).fit_projection:
        explainer = explainer.model_copy(update={"fitted_projection": fit_config(config, task).output})
    return TrainConfig(
        datasets=(f"{config.output}/datasets/{task}",),
        output=f"{config.output}/explainers/{task}",
        explainer=explainer,
        optimization=of_task(config, task).optimization,
        trainer=config.trainer,
        seed=config.seed,
    )


def evaluate_config(config: QuickstartConfig) -> EvaluateConfig:
    return EvaluateConfig(
        runs=tuple(
            EvaluationRun(dataset=f"{config.output}/datasets/{task}", explainer=f"{config.output}/explainers/{task}")
            for task in config.tasks
        ),
        output=f"{config.output}/evaluation",
        max_examples=config.max_examples,
        actors=config.actors,
        seed=config.seed,
    )


def of_task(config: QuickstartConfig, task: TaskName) -> QuickstartTask:
    settings: QuickstartTask = getattr(config, task)
    return settings


if __name__ == "__main__":
    run_job(QuickstartConfig, main, __doc__)
