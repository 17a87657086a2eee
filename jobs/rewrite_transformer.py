"""Replace latents of one layer by what a simulator predicts from their descriptions, and measure what the model loses.

Prints all conditions with intervals and writes scores.json and report.html. Without arguments it runs on the pocket
world and trains its own simulator first; `--simulator FOLDER` takes one, `--explainer FOLDER` adds the descriptions of
a trained explainer to the table. Stop it at any moment; the same command goes on.
"""

from contextlib import ExitStack

from introspect_ray.cli import progress_bar, run_job
from introspect_ray.config import RewriteConfig


def rewrite(config: RewriteConfig) -> str:
    """Rewrite with a progress bar per stage; the table of conditions and one line about what was written."""
    from introspect_ray.training.rewriting import (
        rewrite_transformer,  # Ray and torch load only after the config is checked
    )

    with ExitStack() as stack:
        bars = {}

        def show(stage: str, done: int, total: int, note: str) -> None:
            if stage not in bars:
                bars[stage] = stack.enter_context(progress_bar(stage, "step"))
            bars[stage](done, total, note)

        return rewrite_transformer(config, show).text


def main(config: RewriteConfig) -> None:
    print(rewrite(config))


if __name__ == "__main__":
    run_job(RewriteConfig, main, __doc__)
