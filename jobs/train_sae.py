"""Train an SAE of one place of a target, on texts, with sae-lens' trainer.

Actors hold the target and stream its activations to one trainer. The output is a folder that sae-lens reads. Run the
same command again to go on after a stop, from the newest checkpoint.
"""

from introspect_ray.cli import progress_bar, run_job
from introspect_ray.config import TrainSaeConfig


def train(config: TrainSaeConfig) -> str:
    """Train with a progress bar; one line about what was written."""
    from introspect_ray.training.coders import train_coder  # Ray and torch load only after the config is checked

    with progress_bar("train", "step") as show:
        return train_coder(config, show).line


def main(config: TrainSaeConfig) -> None:
    print(train(config))


if __name__ == "__main__":
    run_job(TrainSaeConfig, main, __doc__)
