"""On a GPU: all conditions of a batch are what they are on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from unit.rewrite_helpers import target, texts, transcoder
from unit.test_rewrite_measure import line, plan_of

from introspect_ray.interventions.target import Target
from introspect_ray.rewrite.measure import measure, read_truth
from introspect_ray.rewrite.site import Site

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")


def test_conditions_are_those_of_the_cpu() -> None:
    model, coder, given = target(), transcoder(), texts()
    plan = plan_of([line("levels", "oracle_levels"), line("deleted", "deleted")], top_k=4)
    here = measure(Site(model, coder), coder, given, {}, plan)
    _, statistics = read_truth(Site(model, coder), coder, given)
    moved, there = Target(model.model.to("cuda"), model.tokenizer), coder.to(torch.device("cuda"))
    found = measure(Site(moved, there), there, given, {}, plan)
    for name, losses in here.losses.items():
        np.testing.assert_allclose(found.losses[name].cross_entropy, losses.cross_entropy, rtol=1e-3, err_msg=name)
    np.testing.assert_allclose(found.harm, here.harm, rtol=1e-2, atol=1e-4)
    _, other = read_truth(Site(moved, there), there, given)
    np.testing.assert_allclose(other.contribution, statistics.contribution, rtol=1e-2, atol=1e-4)
