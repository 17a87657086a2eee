"""Write a page from which the latents of one coder are looked at: exemplars, descriptions with scores, densities.

It opens from disk, without network; exemplars come from collect_exemplars.py.
"""

from introspect_ray.cli import progress_bar, run_job
from introspect_ray.config import BrowseConfig


def main(config: BrowseConfig) -> None:
    from introspect_ray.data.browse import browse_latents  # slow to load, and bad input was to be told first

    with progress_bar("write", "latent") as show:
        line = browse_latents(config, lambda done, total: show(done, total, ""))
    print(line)


if __name__ == "__main__":
    run_job(BrowseConfig, main, __doc__, positional="exemplars")
