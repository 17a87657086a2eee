"""Compiled decoder layers give what plain ones give."""

import shutil

import pytest
import torch
from explainer_helpers import explainer, queries
from training_helpers import train_config

from introspect_ray.errors import UserError
from introspect_ray.explainer.packing import joined
from introspect_ray.training import compiling
from introspect_ray.training.compiling import compile_layers
from introspect_ray.training.loop import build
from introspect_ray.training.run import prepare

ANSWERS = ["up", "down and out", "", "left"]


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="no C++ compiler")
def test_compiled_layers_have_the_same_loss_and_gradient(tmp_path):
    """Packed rows, one or several, of different lengths: compiled once, for all layers."""
    made = explainer(tmp_path, "llama").eval().requires_grad_(True)
    encoded = made.encode(queries(4), ANSWERS)
    batches = [[joined(encoded[:3]), encoded[3]], [joined(encoded[2:]), joined(encoded[:2])]]

    def results():
        found = []
        for batch in batches:
            made.zero_grad()
            loss, _ = made.loss(batch)
            loss.backward()
            found.append((loss.item(), [p.grad.clone() for p in made.model.parameters()]))
        return found

    expected = results()
    names = list(made.trainable_parameters())
    torch._dynamo.reset()
    compile_layers(made)
    counters = torch._dynamo.utils.counters
    counters.clear()
    for (loss, gradients), (plain_loss, plain_gradients) in zip(results(), expected, strict=True):
        assert loss == pytest.approx(plain_loss, rel=1e-5)
        for one, other in zip(gradients, plain_gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * max(1.0, other.abs().max().item()))
    assert counters["stats"]["unique_graphs"] == 1
    assert list(made.trainable_parameters()) == names


def test_without_a_compiler_it_is_refused_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(compiling.shutil, "which", lambda _: None)
    run = prepare(train_config(tmp_path, trainer__compile=True))
    with pytest.raises(UserError, match=r"trainer.compile needs a C\+\+ compiler"):
        build(run)
