"""Collect vectors that no coder knows, to evaluate descriptions on, with the texts that lie most in their direction.

Residual vectors of held-out texts, and differences between those of prompts that differ in their subject. Run the same
command again to go on after a stop: parts of the corpus that are done are kept.
"""

from introspect_ray.cli import progress_bar, run_job
from introspect_ray.config import CollectVectorsConfig


def collect(config: CollectVectorsConfig) -> str:
    """Collect with a progress bar; one line about what was written."""
    from introspect_ray.data.collect_vectors import (
        collect_vectors,  # Ray and torch load only after the config is checked
    )

    with progress_bar("collect", "part") as show:
        return collect_vectors(config, show).line


def main(config: CollectVectorsConfig) -> None:
    print(collect(config))


if __name__ == "__main__":
    run_job(CollectVectorsConfig, main, __doc__)
