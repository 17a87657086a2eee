"""Score descriptions by simulation: how well do the words predict where a latent is active?

Every candidate description is simulated on held-out windows of its latent, beside two controls: the description of
another latent, and none. Writes descriptions.jsonl (with scores), best.jsonl (the best candidate of each latent),
controls.jsonl, scores.json and report.html. Run the same command again to go on after a stop.
"""

from introspect_ray.cli import progress_bar, run_job
from introspect_ray.config import ScoreDescriptionsConfig


def score(config: ScoreDescriptionsConfig) -> str:
    """Score with a progress bar; the table of scores and one line about what was written."""
    from introspect_ray.training.score_descriptions import score_descriptions  # Ray and torch load only now

    with progress_bar("score", "description") as show:
        return score_descriptions(config, show).text


def main(config: ScoreDescriptionsConfig) -> None:
    print(score(config))


if __name__ == "__main__":
    run_job(ScoreDescriptionsConfig, main, __doc__)
