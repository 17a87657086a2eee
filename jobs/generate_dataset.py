"""Run one task's procedure on a target model and write its records as a sharded dataset.

Run the same command again to go on after a stop: shards that are done are kept.
"""

from introspect_ray.cli import progress_bar, run_job
from introspect_ray.config import GenerateConfig


def generate(config: GenerateConfig) -> str:
    """Generate with a progress bar; one line about what was written."""
    from introspect_ray.data.generate import generate_dataset  # Ray and torch load only after the config is checked

    with progress_bar("generate", "item") as show:
        return generate_dataset(
            config, lambda now: show(now.items_done, now.num_items, f"{now.records_written} records")
        ).line


def main(config: GenerateConfig) -> None:
    print(generate(config))


if __name__ == "__main__":
    run_job(GenerateConfig, main, __doc__)
