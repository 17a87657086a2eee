"""Build the pocket world's artifacts: tokenizer, two targets that know its facts, an SAE and a transcoder.

Run the same command again to go on after a stop; stages that are done are kept.
"""

from contextlib import ExitStack

from introspect_ray.cli import progress_bar, run_job
from introspect_ray.config import BuildPocketConfig


def main(config: BuildPocketConfig) -> None:
    from introspect_ray.pocket.build import build_pocket  # torch loads only after the config is checked

    with ExitStack() as stack:
        bars = {}

        def progress(stage: str, step: int, steps: int, loss: float) -> None:
            if stage not in bars:
                bars[stage] = stack.enter_context(progress_bar(stage, "step"))
            bars[stage](step, steps, f"loss {loss:.3f}")

        manifest = build_pocket(config, progress)
    print(f"wrote {len(manifest['files'])} files, {manifest['total_bytes'] / 1e6:.1f} MB, to {config.output}")


if __name__ == "__main__":
    run_job(BuildPocketConfig, main, __doc__)
