"""Fine-tune an explainer on datasets that generate_dataset.py wrote.

Run the same command again to go on after a stop, from the newest checkpoint.
"""

from tqdm import tqdm

from introspect_ray.cli import run_job
from introspect_ray.config import TrainConfig
from introspect_ray.training.train import train_explainer


def main(config: TrainConfig) -> None:
    bars: list[tqdm] = []

    def progress(step: int, steps: int, loss: float) -> None:
        if not bars:
            bars.append(tqdm(desc="train", total=steps, initial=step, unit="step", mininterval=5))
        bars[0].set_postfix(loss=f"{loss:.3f}", refresh=False)
        bars[0].update(step - bars[0].n)

    try:
        summary = train_explainer(config, progress)
    finally:
        for bar in bars:
            bar.close()
    print(summary.line)


if __name__ == "__main__":
    run_job(TrainConfig, main, __doc__)
