"""Training pairs and loss against their definitions; the real loop in this process: resumption, workers, refusals."""

import json
import random

import numpy as np
import pytest
import torch
from explainer_helpers import model_folder
from safetensors.torch import load_file
from tiny_models import tiny_tokenizer

from introspect_ray.config import ScoreDescriptionsConfig, TrainSimulatorConfig
from introspect_ray.data.description_files import read_descriptions
from introspect_ray.errors import RunFailed, UserError
from introspect_ray.features.descriptions import Description, by_latent, description_lines, same_words
from introspect_ray.features.exemplars import Exemplar, LatentExemplars
from introspect_ray.features.windows import Window, window
from introspect_ray.simulator.base_rate import natural_weights
from introspect_ray.simulator.examples import copied, encode_pair, level_loss, soft_levels, training_pairs
from introspect_ray.simulator.finetuned import FinetunedSimulator, LatentSplit, own_card, write_simulator_card
from introspect_ray.training import simulator_loop, simulator_run
from introspect_ray.training.checkpoint import CheckpointStore
from introspect_ray.training.metrics import read_metrics
from introspect_ray.training.simulator_loop import SimulatorStepper, build, fit, weight_power
from introspect_ray.training.simulator_run import prepare
from introspect_ray.training.simulator_split import is_held_out, part_of, split_of_simulator
from introspect_ray.training.workers import Workers

ALONE = Workers(0, 1)
TEXTS = ("the cat sat on the mat", " in Paris the cat", "Paris is the capital of France", " sat on the capital")
WORDS = ("cat", "Paris", "mat", "capital")


def exemplars_of(latent: int, tokenizer) -> LatentExemplars:
    """A latent that fires on one word of the texts."""
    made = []
    for number, text in enumerate(TEXTS):
        one = window(tokenizer(text, add_special_tokens=False).input_ids, tokenizer)
        active = np.array([4.0 if piece.strip() == WORDS[latent] else 0.0 for piece in one.pieces])
        made.append(Exemplar(one, active, "quantile" if active.any() else "random", number if active.any() else None))
    return LatentExemplars(0, latent, 0.1, 4.0, tuple(made))


class Store:
    """Exemplars in memory, in place of a folder."""

    url = "memory"

    class meta:
        run_key, layer, coder, coder_digest = "key", 0, "coder", "digest"

    def __init__(self, tokenizer):
        self.found = [exemplars_of(latent, tokenizer) for latent in range(len(WORDS))]

    def latents(self):
        return self.found

    def read(self, latent, split=None):
        assert split == "train"
        return self.found[latent]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Model and descriptions in `tmp_path`; exemplars from memory."""
    tokenizer = tiny_tokenizer()
    store = Store(tokenizer)
    for module in (simulator_run, simulator_loop):
        monkeypatch.setattr(module, "open_exemplars", lambda _: store)
    model_folder(tmp_path / "base", "llama")
    lines = description_lines(
        Description(0, number, f"the word {word}", "lexicon") for number, word in enumerate(WORDS)
    )
    (tmp_path / "descriptions.jsonl").write_text(lines)
    return tmp_path


def config_of(folder, output="out", **optimization) -> TrainSimulatorConfig:
    return TrainSimulatorConfig.model_validate(
        {
            "exemplars": "memory",
            "descriptions": [str(folder / "descriptions.jsonl")],
            "output": str(folder / output),
            "model": {"path": str(folder / "base"), "device": "cpu"},
            "held_out_share": 0,
            "copy_first": 0,
            "copy_share": 0,
            "optimization": {"steps": 8, "batch_size": 6, "learning_rate": 0.01, **optimization},
            "trainer": {"checkpoint_every": 2, "log_every": 3, "micro_batch_tokens": 128},
            "logging": {"tensorboard": False},
        }
    )


def test_soft_levels_have_the_level_as_their_mean():
    levels = np.array([0.0, 0.25, 3.0, 9.9, 10.0])
    targets = soft_levels(levels)
    assert (targets @ torch.arange(11.0)).tolist() == pytest.approx(levels.tolist(), abs=1e-5)
    assert targets.sum(1).tolist() == pytest.approx([1.0] * 5)
    assert (targets > 0).sum(1).tolist() == [1, 2, 1, 2, 1]


def test_draws_times_weights_are_the_natural_base_rate():
    """Whatever share of the draws fires: the weighted share of firing tokens is each latent's density."""
    tokenizer = tiny_tokenizer()
    latents = [exemplars_of(latent, tokenizer) for latent in range(3)]
    descriptions = by_latent([Description(0, 0, "a", "x"), Description(0, 0, "b", "y"), Description(0, 1, "c", "x")])
    for firing_share in (0.2, 0.7):
        firing, silent = training_pairs(latents, descriptions, firing_share)
        assert {pair.description for pair in firing} == {"a", "b", "c"}  # the third latent has none
        drawn = [(pair, firing_share / len(firing)) for pair in firing]
        drawn += [(pair, (1 - firing_share) / len(silent)) for pair in silent]
        assert sum(chance * pair.weight for pair, chance in drawn) == pytest.approx(1.0)
        for latent, own in ((0, latents[0]), (1, latents[1])):
            mine = [(pair, chance) for pair, chance in drawn if pair.latent == (0, latent)]
            assert sum(chance * pair.weight for pair, chance in mine) == pytest.approx(0.5)
            fires = sum(chance * pair.weight * (pair.exemplar.activations > 0).mean() for pair, chance in mine)
            weights = natural_weights(own.density, own.exemplars)
            natural = sum(
                weight * (one.activations > 0).sum() for weight, one in zip(weights, own.exemplars, strict=True)
            )
            assert fires / 0.5 == pytest.approx(natural) == pytest.approx(own.density)


def test_loss_is_the_weighted_cross_entropy_where_levels_are_read(folder):
    simulator = FinetunedSimulator.create(config_of(folder).model)
    tokenizer = tiny_tokenizer()
    latents = [exemplars_of(latent, tokenizer) for latent in range(2)]
    firing, silent = training_pairs(latents, by_latent([Description(0, 0, "cat", "x")]), 0.5)
    odd = Exemplar(Window((9000, 9001, 9002), ("t", "he", " cat")), np.array([1.0, 0.0, 4.0]), "random")
    firing = [*firing, type(firing[0])("cat", odd, 4.0, 3.0, (0, 0))]
    examples = [encode_pair(simulator, pair) for pair in (*firing, *silent)]
    loss = float(level_loss(simulator, examples))
    expected = 0.0
    for example in examples:
        logits = simulator.model(input_ids=torch.tensor([example.ids])).logits[0, list(example.positions), :11]
        entropy = -(example.targets * logits.log_softmax(-1)).sum(-1)
        expected += example.weight * float(entropy.mean())
    assert loss == pytest.approx(expected, rel=1e-5)
    last = examples[len(firing) - 1]
    prefix = len(simulator.encode("cat"))
    assert last.positions[0] >= prefix and len(last.positions) <= 3
    assert float(last.targets[-1] @ torch.arange(11.0)) == pytest.approx(10.0)


def test_training_learns_which_words_a_description_means(folder):
    run = prepare(config_of(folder, steps=60, batch_size=8, learning_rate=0.01))
    run.record({})
    fit(run, ALONE)
    losses = [line["loss"] for line in read_metrics(run.folder)]
    assert losses[-1] < 0.5 * losses[0]
    simulator = FinetunedSimulator.load(config_of(folder).model.model_copy(update={"path": str(folder / "out")}))
    exemplar = exemplars_of(1, tiny_tokenizer()).exemplars[1]
    own, other = simulator.simulate(["the word Paris", "the word cat"], [exemplar.window] * 2)
    place = int(exemplar.activations.argmax())
    assert own.argmax() == place and own[place] > 5 > other[place]
    assert run.is_complete() and fit(run, ALONE) == run.results()


class Killed(Exception):
    pass


def test_a_killed_run_goes_on_to_the_same_weights(folder, monkeypatch):
    whole = prepare(config_of(folder, "whole"))
    whole.record({})
    fit(whole, ALONE)
    run = prepare(config_of(folder, "killed"))
    run.record({})
    real = SimulatorStepper.step

    def dies(self, number, optimizer):
        if number == 5:
            raise Killed
        return real(self, number, optimizer)

    with monkeypatch.context() as patched:
        patched.setattr(SimulatorStepper, "step", dies)
        with pytest.raises(Killed):
            fit(run, ALONE)
    assert CheckpointStore(run.checkpoints, run.run_key, 2).newest(None) in (2, 4)
    assert not run.is_complete()
    fit(run, ALONE)
    one, other = (load_file(folder / place / "model.safetensors") for place in ("whole", "killed"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    lines = [[{**line, "tokens_per_second": 0} for line in read_metrics(of.folder)] for of in (whole, run)]
    assert lines[0] == lines[1]
    assert [line["step"] for line in lines[0]] == [3, 6, 8]


def test_gradient_is_that_of_the_whole_batch_however_it_is_split(folder):
    config = config_of(folder)
    simulator, strata = build(config)
    simulator.model.eval()
    examples = SimulatorStepper(simulator, strata, config, ALONE).examples(0)
    loss = level_loss(simulator, examples) / 6
    loss.backward()
    loss = float(loss.detach())
    parameters = simulator.trainable_parameters()
    expected = {name: parameter.grad.clone() for name, parameter in parameters.items()}
    total = dict.fromkeys(expected, 0)
    found = 0.0
    for rank in range(2):

        class Half(Workers):
            def sum_gradients(self, parameters, extra):  # noqa: ARG002
                return extra

        stepper = SimulatorStepper(simulator, strata, config, Half(rank, 2))
        stepper.trainable.clip_gradients = lambda _: 0.0

        class Nothing:
            param_groups = ()

            def step(self):
                pass

        found += stepper.step(0, Nothing())[0]
        total = {name: total[name] + parameter.grad for name, parameter in parameters.items()}
    assert found == pytest.approx(loss, rel=1e-5)
    for name in expected:
        torch.testing.assert_close(total[name], expected[name], rtol=1e-4, atol=1e-7)


def test_copies_say_where_their_words_are(folder):
    pair = training_pairs([exemplars_of(0, tiny_tokenizer())], by_latent([Description(0, 0, "cat", "x")]), 0.5)[0][0]
    for number in range(20):
        made = copied(pair, random.Random(number))
        words = made.description.split()[2:]
        assert made.description.startswith("the words " if len(words) > 1 else "the word ")
        pieces = [piece.strip() for piece in pair.exemplar.window.pieces]
        assert 1 <= len(words) <= max(1, min(4, len(set(pieces)) // 2))
        assert made.exemplar.activations.tolist() == [float(piece in words) for piece in pieces]
    config = config_of(folder).model_copy(update={"copy_share": 0.5})
    stepper = SimulatorStepper(*build(config), config, ALONE)
    steps = [stepper.examples(number) for number in (0, 3, 7)]
    assert [len(examples) for examples in steps] == [9, 9, 6]
    power = weight_power(3, 8, config.balanced_share)
    assert [example.weight for example in steps[1][6:]] == [pytest.approx(1 - power)] * 3
    again = SimulatorStepper(*build(config), config, ALONE).examples(3)
    assert [example.ids for example in again] == [example.ids for example in steps[1]]


def test_copies_come_first(folder):
    config = config_of(folder).model_copy(update={"copy_first": 0.25})
    stepper, plain = (SimulatorStepper(*build(one), one, ALONE) for one in (config, config_of(folder)))
    assert [{example.weight for example in stepper.examples(number)} for number in (0, 1)] == [{1.0}] * 2
    assert [len(stepper.examples(number)) for number in (0, 1, 2)] == [6, 6, 6]
    # Then latents, from their first draw, their weights equal.
    assert [example.ids for example in stepper.examples(2)] == [example.ids for example in plain.examples(0)]
    assert {example.weight for example in stepper.examples(2)} == {1.0}


def test_weights_go_from_equal_to_natural(folder):
    assert [weight_power(step, 10, 0.5) for step in (0, 1, 4, 5, 9)] == [0.0, 0.2, 0.8, 1.0, 1.0]
    assert weight_power(0, 10, 0.0) == 1.0
    config = config_of(folder)
    stepper = SimulatorStepper(*build(config), config, ALONE)
    natural = {pair.weight for pair in stepper._pairs}
    assert min(natural) < 0.9
    assert {example.weight for example in stepper.examples(0)} == {1.0}
    assert {example.weight for example in stepper.examples(7)} <= natural


def test_not_a_number_ends_the_run(folder, monkeypatch):
    run = prepare(config_of(folder))
    run.record({})
    monkeypatch.setattr(simulator_loop, "level_loss", lambda *args: level_loss(*args) * float("nan"))
    with pytest.raises(RunFailed, match=r"step 1: loss is nan"):
        fit(run, ALONE)


def test_held_out_latents_are_not_trained_on_nor_are_their_texts(folder):
    config = config_of(folder).model_copy(update={"held_out_share": 0.5, "seed": 3})
    split = LatentSplit(held_out_share=0.5, seed=3, coder="coder", coder_digest="digest")
    held_out = [latent for latent in range(len(WORDS)) if is_held_out(split, (0, latent))]
    trained = [latent for latent in range(len(WORDS)) if latent not in held_out]
    assert held_out and len(trained) > 1
    # A held-out latent has a second candidate, and a trained one its text, in other letters.
    more = [
        Description(0, held_out[0], "a pet", "llm:x"),
        Description(0, trained[0], "A  Pet", "llm:x"),
        Description(0, trained[0], "a dog", "llm:x"),
    ]
    with (folder / "descriptions.jsonl").open("a") as file:
        file.write(description_lines(more))
    simulator, strata = build(config)
    assert {(pair.latent[1], pair.description) for part in strata for pair in part} == {
        *((latent, f"the word {WORDS[latent]}") for latent in trained),
        (trained[0], "a dog"),
    }
    assert simulator.card.split == split
    assert prepare(config).num_latents == len(trained)
    everything = by_latent(read_descriptions(str(folder / "descriptions.jsonl")))
    parts = {part: part_of(everything, split, part) for part in ("held_out", "trained")}
    texts = {
        part: {same_words(one.text) for candidates in groups.values() for one in candidates}
        for part, groups in parts.items()
    }
    assert sorted(parts["held_out"]) == [(0, latent) for latent in held_out]
    assert sorted(parts["trained"]) == [(0, latent) for latent in trained]
    assert not texts["held_out"] & texts["trained"]
    # The hash is of the latent alone: another seed draws others, another text the same.
    shares = [
        np.mean(
            [is_held_out(split.model_copy(update={"seed": seed, "held_out_share": 0.3}), (1, n)) for n in range(900)]
        )
        for seed in (0, 1)
    ]
    assert shares == pytest.approx([0.3, 0.3], abs=0.05) and shares[0] != shares[1]
    with pytest.raises(UserError, match=r"left to train on: all are held out$"):
        prepare(config.model_copy(update={"held_out_share": 0.999}))
    with pytest.raises(UserError, match=r"held out, or lack a label_f1 of 0.5"):
        prepare(config.model_copy(update={"label_score": "label_f1"}))
    few = build(config_of(folder).model_copy(update={"max_latents": 2}))[1]
    assert len({pair.latent for part in few for pair in part}) == 2


def test_scores_use_the_split_that_the_simulator_was_trained_with(tmp_path):
    def write(split):
        card = own_card("base", tiny_tokenizer(), split)
        write_simulator_card(tmp_path, card)
        return card

    split = LatentSplit(held_out_share=0.25, seed=4, coder="runs/sae", coder_digest="one")
    write(split)
    assert split_of_simulator(str(tmp_path), "elsewhere/sae", "one") == split
    with pytest.raises(UserError, match=r"was trained on latents of runs/sae, which are not those of runs/other"):
        split_of_simulator(str(tmp_path), "runs/other", "two")
    write(None)
    with pytest.raises(UserError, match=r"does not say which latents it was trained without: train it again"):
        split_of_simulator(str(tmp_path), "runs/sae", "one")
    with pytest.raises(ValueError, match=r"expected held_out or trained, found all"):
        ScoreDescriptionsConfig(split_of="runs/simulator")


def test_bad_input_is_refused_before_a_model_loads(folder):
    run = prepare(config_of(folder))
    run.record({})
    with pytest.raises(UserError, match=r"optimization.steps is 8 there, 9 here"):
        prepare(config_of(folder, steps=9))
    (folder / "descriptions.jsonl").write_text(json.dumps({"layer": 3, "latent": 0, "text": "a", "source": "x"}) + "\n")
    with pytest.raises(UserError, match=r"none of the 1 latents described in .* fires in memory \(layer 0\)"):
        prepare(config_of(folder, "other"))
    with pytest.raises(ValueError, match=r"trainer.sharding is not for simulators: expected none"):
        TrainSimulatorConfig.model_validate({"trainer": {"sharding": "fsdp2"}})
