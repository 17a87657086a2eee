"""Build the pocket world's artifacts: tokenizer, two targets that know its facts, an SAE and a transcoder.

Run the same command again to go on after a stop; stages that are done are kept.
"""

from tqdm import tqdm

from introspect_ray.cli import run_job
from introspect_ray.config import BuildPocketConfig
from introspect_ray.pocket.build import build_pocket


def main(config: BuildPocketConfig) -> None:
    bars: dict[str, tqdm] = {}

    def progress(stage: str, step: int, steps: int, loss: float) -> None:
        bar = bars.setdefault(stage, tqdm(desc=stage, total=steps, unit="step", mininterval=5))
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        bar.update(step - bar.n)
        if step == steps:
            bar.close()

    manifest = build_pocket(config, progress)
    print(f"wrote {len(manifest['files'])} files, {manifest['total_bytes'] / 1e6:.1f} MB, to {config.output}")


if __name__ == "__main__":
    run_job(BuildPocketConfig, main, __doc__)
