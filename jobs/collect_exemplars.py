"""Collect what every latent of some SAEs or transcoders responds to, over many texts: exemplars, densities, maxima.

Run the same command again to go on after a stop: shards that are done are kept.
"""

from contextlib import ExitStack

from introspect_ray.cli import progress_bar, run_job
from introspect_ray.config import CollectConfig


def collect(config: CollectConfig) -> str:
    """Collect with a progress bar per stage; one line about what was written."""
    from introspect_ray.data.collect import collect_exemplars  # Ray and torch load only after the config is checked

    units = {"scan": "shard", "choose": "block", "gather": "shard", "merge": "block"}
    with ExitStack() as stack:
        bars = {}

        def show(stage: str, done: int, total: int, note: str) -> None:
            if stage not in bars:
                bars[stage] = stack.enter_context(progress_bar(stage, units[stage]))
            bars[stage](done, total, note)

        return collect_exemplars(config, show).line


def main(config: CollectConfig) -> None:
    print(collect(config))


if __name__ == "__main__":
    run_job(CollectConfig, main, __doc__)
