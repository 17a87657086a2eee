"""Fine-tune an explainer on datasets that generate_dataset.py wrote.

Run the same command again to go on after a stop, from the newest checkpoint. With `--plan`, print what the run needs
(memory of every worker, steps, time) and end with status 0 if it fits and 2 if it does not; no weights are needed.
"""

from introspect_ray.cli import progress_bar, run_job
from introspect_ray.config import TrainConfig

SWITCHES = {"plan": "plan.show"}


def train(config: TrainConfig) -> str:
    """Train with a progress bar; one line about what was written."""
    from introspect_ray.training.train import train_explainer  # Ray and torch load only after the config is checked

    with progress_bar("train", "step") as show:
        return train_explainer(config, show).line


def show_plan(config: TrainConfig) -> None:
    """Print the plan. Raises UserError if the run would not fit."""
    from introspect_ray.training.plan import check_plan, plan_run
    from introspect_ray.training.plan_table import table

    plan = plan_run(config)
    print(table(plan), flush=True)
    check_plan(plan)


def main(config: TrainConfig) -> None:
    if config.plan.show:
        show_plan(config)
    else:
        print(train(config))


if __name__ == "__main__":
    run_job(TrainConfig, main, __doc__, switches=SWITCHES)
