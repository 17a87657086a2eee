"""Describe latents of an SAE or transcoder in words, several candidates each, and write descriptions.jsonl.

A language model (any OpenAI-compatible endpoint, or a local one on Ray actors) sees exemplars, a trained explainer gets
the decoder row, or the labels of the pocket coders are looked up.
Run the same command again to go on after a stop: latents that are described are kept.
"""

from introspect_ray.cli import progress_bar, run_job
from introspect_ray.config import DescribeConfig


def main(config: DescribeConfig) -> None:
    from introspect_ray.training.describe import describe_latents  # Ray and torch load after the config is checked

    with progress_bar("describe", "latent") as show:
        line = describe_latents(config, show).line
    print(line)


if __name__ == "__main__":
    run_job(DescribeConfig, main, __doc__)
