"""Write a dataset in the layouts that P1 published, read such files as a dataset, or turn its pickles into plain files.

Pickles are read by a restricted reader that builds tensors and plain values and refuses all else.
"""

from introspect_ray.cli import run_job
from introspect_ray.config import ConvertConfig


def main(config: ConvertConfig) -> None:
    from introspect_ray.data import interchange

    actions = {
        "to_published": interchange.to_published,
        "from_published": interchange.from_published,
        "pickles": interchange.convert_pickles,
    }
    print(actions[config.action](config))


if __name__ == "__main__":
    run_job(ConvertConfig, main, __doc__)
