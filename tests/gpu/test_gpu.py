"""On a GPU: the ladder says what hooks say, and an explainer says there what it says on the CPU."""

from __future__ import annotations

import pytest
import torch
from explainer_helpers import explainer, model, queries, tokenizer

from introspect_ray.config import ChatConfig
from introspect_ray.explainer.model import Explainer
from introspect_ray.interventions.clean import clean_runs
from introspect_ray.interventions.hooked import hooked_logits
from introspect_ray.interventions.ladder import Ladder
from introspect_ray.interventions.target import Target
from introspect_ray.interventions.types import CleanRun, Intervention
from introspect_ray.models.chat import ask
from introspect_ray.models.local_chat import LocalChat

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")

WIDTH, VOCABULARY = 32, 264
FAMILIES = ("llama", "qwen3")


def sweep(runs: list[CleanRun], dtype: torch.dtype) -> tuple[list[CleanRun], list[Intervention]]:
    """Every block of layers at several positions of every run, vectors as large as the residuals they replace."""
    generator = torch.Generator().manual_seed(0)
    of_runs, rows = [], []
    for run in runs:
        for layers in ((0,), (1,), (0, 1)):
            for position in (0, len(run) // 2, len(run) - 1):
                vector = torch.randn(1, WIDTH, generator=generator) * run.residuals.float().std().item()
                of_runs.append(run)
                rows.append(Intervention(layers, (position,), vectors=vector.to("cuda", dtype)))
    return of_runs, rows


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2.0**-5)])
@pytest.mark.parametrize("family", FAMILIES)
def test_ladder_equals_hooks(family: str, dtype: torch.dtype, tolerance: float) -> None:
    target = model(family, VOCABULARY, WIDTH).to("cuda", dtype).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in (24, 3, 11)]
    with torch.no_grad():
        runs, rows = sweep(clean_runs(target, prompts, keep_cache=True), dtype)
        climbed, hooked = Ladder(target).logits(runs, rows).float(), hooked_logits(target, runs, rows).float()
    clean = torch.stack([run.logits for run in runs]).float()
    assert climbed.device.type == "cuda" and torch.isfinite(climbed).all()
    # bfloat16 has 8 bits of mantissa: sums in another order differ by a few units of the largest logit's last place.
    scale = hooked.abs().max()
    assert (climbed - hooked).abs().max() < tolerance * scale
    assert (hooked - clean).abs().amax(1).median() > 2 * tolerance * scale, "interventions have effects to be measured"


def test_a_target_on_the_gpu_says_what_it_says_on_the_cpu() -> None:
    text = tokenizer()
    prompts = [text(words).input_ids for words in ("one two three four", "five", "six seven")]
    found = []
    for device in ("cpu", "cuda"):
        target = Target(model("llama", len(text), WIDTH).to(device).eval().requires_grad_(False), text)
        runs = target.clean_runs(prompts)
        vector = torch.linspace(-1, 1, WIDTH)[None].to(device)
        rows = [[Intervention((0, 1), (len(ids) // 2,), vectors=vector)] for ids in prompts]
        found.append(torch.cat(target.patched_logits(runs, rows)).cpu())
    assert (found[0] - found[1]).abs().max() < 1e-3


def test_a_chat_model_says_what_it_says_on_the_cpu() -> None:
    text = tokenizer()
    questions = [ask("cat"), ask("the cat sat on the mat"), ask("so")]
    said, chosen = [], []
    for device in ("cpu", "cuda"):
        config = ChatConfig(max_tokens=6, temperature=0.7)
        chat = LocalChat(model("llama", len(text), 32).to(device).eval().requires_grad_(False), text, config, seed=0)
        said.append([one.text for one in chat.complete(questions)])
        chosen.append([one.probabilities for one in chat.choose(questions, ("yes", "no"))])
    assert said[0] == said[1]
    for one, other in zip(*chosen, strict=True):
        assert one == pytest.approx(other, rel=1e-3)


@pytest.fixture
def pair(tmp_path) -> tuple[Explainer, Explainer]:
    """The same explainer, with projections, on the CPU and on the GPU."""
    made = explainer(tmp_path, "llama", target_width=20).eval()
    made.save(str(tmp_path / "saved"))
    return made, Explainer.load(str(tmp_path / "saved"), "cuda", "float32").eval()


def test_explainer_loss_equals_that_of_the_cpu(pair: tuple[Explainer, Explainer]) -> None:
    losses = []
    for one in pair:
        loss, count = one.loss(one.encode(queries(7, 20), ["up", "down and out", "", "left", "x", "y z", "no"]))
        assert loss.device.type == one.device.type
        losses.append((loss.item() / count, count))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_explanations_equal_those_of_the_cpu(pair: tuple[Explainer, Explainer]) -> None:
    cpu, cuda = (one.explain(queries(9, 20), batch_size=4) for one in pair)
    assert cpu == cuda
