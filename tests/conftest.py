"""Shapes and types of the numeric core are checked in every test run.

The import hook must be in place before the packages are first imported, which is why it sits here, at the top.
"""

import os

from jaxtyping import install_import_hook

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tiny models gain nothing from a second thread, and threads of several processes wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

CHECKED_PACKAGES = ("interventions", "explainer", "models", "features", "evaluation", "simulator")

install_import_hook([f"introspect_ray.{package}" for package in CHECKED_PACKAGES], "beartype.beartype")
