"""Tell the cluster that this node is about to be taken away: preStop of spot pods, or the last act of a spot machine.

Ray places nothing here any more; what runs may finish until `--deadline_s` is over.
"""

from introspect_ray.cli import run_job
from introspect_ray.config import LeaveConfig


def main(config: LeaveConfig) -> None:
    from introspect_ray.data.leaving import leave  # Ray loads only after the config is checked

    print(leave(config))


if __name__ == "__main__":
    run_job(LeaveConfig, main, __doc__)
