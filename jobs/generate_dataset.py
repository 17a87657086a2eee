"""Run one task's procedure on a target model and write its records as a sharded dataset.

python jobs/generate_dataset.py --config FILE.yaml --task activation_patching --output runs/patching
"""

from introspect_ray.cli import progress_bar, run_job
from introspect_ray.config import GenerateConfig


def main(config: GenerateConfig) -> None:
    from introspect_ray.data.generate import generate_dataset  # Ray and torch load only after the config is checked

    with progress_bar("generate", "item") as show:
        summary = generate_dataset(
            config, lambda now: show(now.items_done, now.num_items, f"{now.records_written} records")
        )
    print(summary.line)


if __name__ == "__main__":
    run_job(
        GenerateConfig, main, "Run one task's procedure on a target model and write its records as a sharded dataset."
    )
