"""Score descriptions with a language model: detection and fuzzing on held-out windows, an LM judge and embedding
similarity against labels.

Beside every description stand two controls: the description of another latent, and none. Writes descriptions.jsonl
(with scores), judgements.jsonl, controls.jsonl, scores.json and report.html. Run the same command again to go on after
a stop.
"""

from introspect_ray.cli import progress_bar, run_job
from introspect_ray.config import JudgeDescriptionsConfig


def main(config: JudgeDescriptionsConfig) -> None:
    from introspect_ray.training.judge_descriptions import judge_descriptions  # Ray and torch load only now

    with progress_bar("judge", "description") as show:
        text = judge_descriptions(config, show).text
    print(text)


if __name__ == "__main__":
    run_job(JudgeDescriptionsConfig, main, __doc__)
