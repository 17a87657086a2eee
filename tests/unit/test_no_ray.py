"""Only data/, training/ and serving/ may need Ray: everything else imports without it."""

import json
import subprocess
import sys

IMPORT_ALL = """
import importlib, json, pkgutil, sys
import introspect_ray
RUNTIME = ("data", "training", "serving")
names = [
    module.name
    for module in pkgutil.walk_packages(introspect_ray.__path__, "introspect_ray.")
    if module.name.split(".")[1] not in RUNTIME
]
for name in names:
    importlib.import_module(name)
heavy = [name for name in ("ray", "sae_lens", "transformer_lens") if name in sys.modules]
print(json.dumps({"names": names, "heavy": heavy}))
"""


def test_importing_the_core_leaves_ray_unimported():
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True, timeout=200, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["heavy"] == []
    assert {
        "introspect_ray.cli",
        "introspect_ray.interventions.target",
        "introspect_ray.explainer.model",
        "introspect_ray.features.sae",
        "introspect_ray.tasks.registry",
        "introspect_ray.evaluation.report",
        "introspect_ray.pocket.build",
    } <= set(found["names"])
