"""Convert descriptions of latents between our descriptions.jsonl, Neuronpedia's bulk files, delphi's result folders and
the labels that ship with the pocket coders.

Every row that is not used is counted with its reason, and listed in unused.jsonl.
"""

from introspect_ray.cli import run_job
from introspect_ray.config import ConvertDescriptionsConfig


def main(config: ConvertDescriptionsConfig) -> None:
    from introspect_ray.data.convert_descriptions import convert_descriptions

    print(convert_descriptions(config))


if __name__ == "__main__":
    run_job(ConvertDescriptionsConfig, main, __doc__)
