"""Fine-tune a simulator: from a description it says how active the latent is on every token of a text.

Reads exemplars (collect_exemplars.py) and descriptions (describe_latents.py, convert_descriptions.py). Run the same
command again to go on after a stop, from the newest checkpoint.
"""

from introspect_ray.cli import progress_bar, run_job
from introspect_ray.config import TrainSimulatorConfig


def train(config: TrainSimulatorConfig) -> str:
    """Train with a progress bar; one line about what was written."""
    from introspect_ray.training.train_simulator import train_simulator  # Ray and torch load only now

    with progress_bar("train", "step") as show:
        return train_simulator(config, show).line


def main(config: TrainSimulatorConfig) -> None:
    print(train(config))


if __name__ == "__main__":
    run_job(TrainSimulatorConfig, main, __doc__)
