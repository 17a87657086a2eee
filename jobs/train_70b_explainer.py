"""Fine-tune an explainer of 70 B parameters: Llama-3.1-70B with QLoRA, sharded with FSDP2, on any task.

`--model`, `--task` and `--target` choose a ready config with P1's hyperparameters; a file and options go over it.
Run the same command again to go on after a stop. `--plan` prints what the run needs, without any weights.
"""

import train_explainer

from introspect_ray.cli import run_job
from introspect_ray.presets import Train70BConfig


def main(config: Train70BConfig) -> None:
    train_explainer.main(config.training())


if __name__ == "__main__":
    run_job(Train70BConfig, main, __doc__, switches=train_explainer.SWITCHES)
