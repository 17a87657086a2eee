"""Verify a finished dataset against its manifest, summarise it, and write one HTML page about it.

Exit status 1 if a problem was found; every problem is listed.
"""

from introspect_ray.cli import run_job
from introspect_ray.config import InspectConfig
from introspect_ray.errors import RunFailed


def main(config: InspectConfig) -> None:
    from introspect_ray.data.inspect import inspect_dataset
    from introspect_ray.data.inspection_page import inspection_lines, write_inspection

    inspection = inspect_dataset(config.dataset, config.num_examples)
    print(*inspection_lines(inspection), sep="\n")
    page = write_inspection(inspection, config.page)
    if inspection.problems:
        raise RunFailed(f"{len(inspection.problems)} problems in {config.dataset}, listed above and in {page}")
    print(f"no problem found; wrote {page}")


if __name__ == "__main__":
    run_job(InspectConfig, main, __doc__, positional="dataset")
