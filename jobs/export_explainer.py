"""Write an explainer for others to load: with its model card, its scores, and on request its adapter merged.

Checkpoints that P1 published become explainers of ours; say which model they explain:
    --explainer hf://OWNER/NAME --target MODEL
"""

from introspect_ray.cli import run_job
from introspect_ray.config import ExportConfig


def main(config: ExportConfig) -> None:
    from introspect_ray.training.export import export_explainer  # torch loads only after the config is checked

    print(export_explainer(config))


if __name__ == "__main__":
    run_job(ExportConfig, main, __doc__)
