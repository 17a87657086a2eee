"""Fit the linear maps that an explainer's projections start from, on plain text and without any label.

The maps take the target's residual stream, layer by layer, to the explainer's input embeddings (closed-form ridge
regression; the tokenizers may differ). Pass the folder to training as `explainer.fitted_projection`.
"""

from introspect_ray.cli import progress_bar, run_job
from introspect_ray.config import FitProjectionConfig


def fit(config: FitProjectionConfig) -> str:
    """Fit with a progress bar; one line about what was written."""
    from introspect_ray.training.projection import fit_projection  # torch loads only after the config is checked

    with progress_bar("fit projection", "text") as show:
        return fit_projection(config, lambda done, texts: show(done, texts, "")).line


def main(config: FitProjectionConfig) -> None:
    print(fit(config))


if __name__ == "__main__":
    run_job(FitProjectionConfig, main, __doc__)
