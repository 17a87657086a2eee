"""Fine-tune an explainer on datasets that generate_dataset.py wrote.

Run the same command again to go on after a stop, from the newest checkpoint.
"""

from introspect_ray.cli import progress_bar, run_job
from introspect_ray.config import TrainConfig


def train(config: TrainConfig) -> str:
    """Train with a progress bar; one line about what was written."""
    from introspect_ray.training.train import train_explainer  # Ray and torch load only after the config is checked

    with progress_bar("train", "step") as show:
        return train_explainer(config, show).line


def main(config: TrainConfig) -> None:
    print(train(config))


if __name__ == "__main__":
    run_job(TrainConfig, main, __doc__)
