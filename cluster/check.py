"""Look at a running cluster before a job does: nodes, GPUs, versions, bandwidth, storage, and what would stop each job.

Exit status 0 if every job of `--jobs` could run, 1 if one could not; each reason is a line. Joins the cluster that
RAY_ADDRESS names, or runs on it under `ray job submit`; without either it looks at this machine alone.
    --storage s3://BUCKET/FOLDER --jobs train_70b_explainer
"""

from introspect_ray.cli import run_job
from introspect_ray.config import CheckConfig
from introspect_ray.errors import RunFailed


def main(config: CheckConfig) -> None:
    from introspect_ray.training.cluster_check import check_cluster  # Ray loads only after the config is checked

    found = check_cluster(config, print)
    stopped = [job for job in config.jobs if found[job]]
    if stopped:
        raise RunFailed(
            f"{len(stopped)} of {len(config.jobs)} jobs cannot run here: {', '.join(stopped)}; reasons above"
        )
    print(f"all {len(config.jobs)} jobs that were asked for can run here")


if __name__ == "__main__":
    run_job(CheckConfig, main, __doc__)
