"""Exemplars from Neuronpedia's bulk files of one source: descriptions are written from them as from our own.

They have no windows at the natural base rate; collect_exemplars.py collects such.
"""

from introspect_ray.cli import run_job
from introspect_ray.config import ImportExemplarsConfig


def main(config: ImportExemplarsConfig) -> None:
    from introspect_ray.data.import_exemplars import import_exemplars

    print(import_exemplars(config))


if __name__ == "__main__":
    run_job(ImportExemplarsConfig, main, __doc__)
