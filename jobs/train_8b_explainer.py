"""Fine-tune an explainer of 8 B parameters: Llama-3.1-8B, Llama-3-8B, Llama-3.1-8B-Instruct or Qwen3-8B, on any task.

`--model`, `--task` and `--target` choose a ready config with P1's hyperparameters; a file and options go over it.
Run the same command again to go on after a stop. `--plan` prints what the run needs, without any weights.
"""

import train_explainer

from introspect_ray.cli import run_job
from introspect_ray.presets import Train8BConfig


def main(config: Train8BConfig) -> None:
    train_explainer.main(config.training())


if __name__ == "__main__":
    run_job(Train8BConfig, main, __doc__, switches=train_explainer.SWITCHES)
