"""A trainer of coders whose process ends itself; where Ray's workers can import it."""

import os
import signal
from pathlib import Path

from introspect_ray.training.coders import CoderTrainer


class DyingTrainer(CoderTrainer):
    """Dies at the fourth line of metrics, unless one did so before."""

    def run(self, run, texts, held_out):
        mark = Path(run.config.output).parent / "died"
        for number, line in enumerate(super().run(run, texts, held_out)):
            if number == 3 and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            yield line
