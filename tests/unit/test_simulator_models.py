"""Prompted and fine-tuned simulators against one plain forward pass per pair, over families and tokenizers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import FAMILIES, randomized, tiny_model, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from introspect_ray.config import ModelConfig, SimulatorConfig
from introspect_ray.errors import UserError
from introspect_ray.features.windows import Window, window
from introspect_ray.simulator.cache import CachedSimulator
from introspect_ray.simulator.finetuned import FinetunedSimulator, own_card
from introspect_ray.simulator.levels import class_tokens, digit_tokens, levels_only
from introspect_ray.simulator.loading import check_simulator, load_simulator
from introspect_ray.simulator.passes import Ask, LevelPasses
from introspect_ray.simulator.prompted import PromptedSimulator
from introspect_ray.simulator.reading import Reading, levels_at_positions, piece_ends, read_window

TEXTS = ("the cat sat on the mat in Paris", "Paris is the capital", "sat sat", "é on the mat \N{GRINNING FACE} in")
DESCRIPTIONS = ("the word cat", "words after the", "capitals of France, " * 3)


def wide_model(vocabulary: int, positions: int = 1024) -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = LlamaConfig(**shape, vocab_size=vocabulary, max_position_embeddings=positions)
        return randomized(LlamaForCausalLM(config))


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(bos=True)


def windows_of(tokenizer) -> list[Window]:
    return [window(tokenizer(text, add_special_tokens=False).input_ids, tokenizer) for text in TEXTS]


def pairs_of(tokenizer):
    return zip(*[(description, one) for description in DESCRIPTIONS for one in windows_of(tokenizer)], strict=True)


def plain_levels(model, ids, positions, level_ids, values) -> np.ndarray:
    """The definition: softmax over the level tokens' logits of one whole sequence, expectation of the level."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([list(ids)])).logits[0][list(positions)][:, list(level_ids)]
    return (logits.double().softmax(-1).numpy() * np.asarray(values)).sum(-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_prefixes_and_padding_change_nothing(family, monkeypatch):
    model = tiny_model(family)
    monkeypatch.setattr("introspect_ray.simulator.passes.SHARED_FROM", 4)
    levels = class_tokens(range(20, 31))
    base = (5, 6, 7)
    passes = LevelPasses(model, levels, base)
    assert passes.shares
    rows = [Reading(tuple(range(8 + n, 12 + 2 * n)), tuple(range(4 + n))) for n in range(4)]
    asks = [Ask((40, 41, 42), row) for row in rows] + [Ask((50,), rows[1]), Ask((40, 41, 42), rows[0])]
    found = passes.read(asks)
    for ask, one in zip(asks, found, strict=True):
        before = (*base, *ask.description)
        ids = (*before, *ask.window.ids)
        expected = plain_levels(model, ids, range(len(before), len(ids)), levels.ids, levels.values)
        np.testing.assert_allclose(one, expected, atol=1e-4)
    assert max(map(np.ptp, found)) > 0.1


def test_a_model_that_cannot_share_is_read_in_full(caplog, monkeypatch):
    model, asks = tiny_model("llama"), [Ask((40, 41), Reading((8, 9), (0, 1)))] * 3
    expected = LevelPasses(model, class_tokens(range(11)), (5, 6)).read(asks)
    real = type(model).forward

    def forgetful(self, **kwargs):
        return real(self, **{**kwargs, "past_key_values": None})

    monkeypatch.setattr(type(model), "forward", forgetful)
    passes = LevelPasses(model, class_tokens(range(11)), (5, 6))
    for one, other in zip(passes.read(asks), expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert not passes.shares
    assert "shares no prefixes" in caplog.text


def test_the_models_own_treatment_of_logits_stays():
    """Gemma 2 caps its logits; the head over level tokens alone is capped too, and the whole head comes back."""
    model = tiny_model("gemma2")
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        with levels_only(model, class_tokens(range(11))):
            few = model(input_ids=ids).logits
        again = model(input_ids=ids).logits
    torch.testing.assert_close(few, whole[..., :11])
    assert torch.equal(whole, again)
    uncapped = torch.atanh(whole / 30) * 30
    assert (uncapped - whole).abs().max() > 1e-3  # else the cap shows nothing


def test_finetuned_reads_every_token_at_its_own_position(tokenizer):
    model = wide_model(len(tokenizer))
    simulator = FinetunedSimulator(model, tokenizer, own_card("base"))
    descriptions, windows = pairs_of(tokenizer)
    for description, one, found in zip(descriptions, windows, simulator.simulate(descriptions, windows), strict=True):
        prefix = tokenizer(" ".join(description.split()) + "\n").input_ids
        assert prefix[0] == tokenizer.bos_token_id
        ids = [*prefix, *one.ids]
        expected = plain_levels(model, ids, range(len(prefix), len(ids)), range(11), range(11))
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_saved_simulator_gives_the_same_levels(tokenizer, tmp_path):
    simulator = FinetunedSimulator(wide_model(len(tokenizer)), tokenizer, own_card("base"))
    simulator.save(str(tmp_path / "s"))
    config = SimulatorConfig(model=ModelConfig(path=str(tmp_path / "s"), device="cpu"))
    assert check_simulator(config) == "finetuned"
    pairs = [list(side) for side in pairs_of(tokenizer)]
    for one, other in zip(load_simulator(config).simulate(*pairs), simulator.simulate(*pairs), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    content = json.loads((tmp_path / "s" / "simulator.json").read_text())
    (tmp_path / "s" / "simulator.json").write_text(json.dumps({**content, "level_ids": [1, 2]}))
    with pytest.raises(UserError, match=r"expected 11 level_ids"):
        check_simulator(config)
    with pytest.raises(UserError, match=r"no simulator\.json"):
        check_simulator(config.model_copy(update={"model": ModelConfig(path="pocket:target_a"), "kind": "finetuned"}))


def published_checkpoint(folder: Path) -> PreTrainedTokenizerFast:
    """A folder of the layout of P1's simulator: Llama 3's special ids, and five rows more in the embedding."""
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(f"filler {index}" for index in range(256, 128000))]
    backend = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|begin_of_text|>"])
    from tokenizers.processors import TemplateProcessing

    backend.post_processor = TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 128000)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|begin_of_text|>")
    assert tokenizer.bos_token_id == 128000
    config = LlamaConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=128261,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        randomized(LlamaForCausalLM(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def test_published_checkpoints_load_as_they_are(tmp_path):
    folder = tmp_path / "features_explain_x_simulator"
    tokenizer = published_checkpoint(folder)
    config = SimulatorConfig(model=ModelConfig(path=str(folder), device="cpu"), cache_tokens=0)
    assert check_simulator(config) == "published"
    simulator = load_simulator(config)
    one = window([128000, *tokenizer("In Paris", add_special_tokens=False).input_ids], tokenizer)
    (found,) = simulator.simulate(["the city"], [one])
    prefix = tokenizer("## Neuron Description: the city\n\n ## Input: ").input_ids
    ids = [128257 if token == 128000 else token for token in (*prefix, *one.ids)]
    assert ids.count(128257) == 2
    expected = plain_levels(simulator.model, ids, range(len(prefix), len(ids)), range(11), range(11))
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_prompted_reads_before_every_question_mark(tokenizer):
    """Against the prompt put together by hand, without cache and batches."""
    model = wide_model(len(tokenizer))
    simulator = PromptedSimulator(model, tokenizer)
    levels = digit_tokens(tokenizer)
    assert levels.values == tuple(10 * digit / 9 for digit in range(10))  # ten is two tokens here
    one = windows_of(tokenizer)[0]
    (found,) = simulator.simulate(["the word  cat"], [one])

    def plain(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    before = list(simulator.passes.base)
    assert before[0] == tokenizer.bos_token_id
    assert tokenizer.decode(before).endswith("Description: ")
    ids, positions = [*before, *plain("the word cat"), *plain("\n")], []
    for piece in one.pieces:
        ids += [*plain(piece), *plain("\t")]
        positions.append(len(ids) - 1)
        ids += [*plain("?"), *plain("\n")]
    expected = plain_levels(model, ids, positions, [plain(str(digit))[0] for digit in range(10)], levels.values)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_prompted_follows_the_chat_template_and_parts_of_characters():
    chatty = tiny_tokenizer(bos=True)
    chatty.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ '<|user|>' if m.role == 'user' else '' }}{{ m.content }}{% endfor %}"
    )
    simulator = PromptedSimulator(wide_model(len(chatty)), chatty)
    base = list(simulator.passes.base)
    assert base.count(chatty.bos_token_id) == 1 and base[0] == chatty.bos_token_id
    assert base.count(chatty.convert_tokens_to_ids("<|user|>")) == 4
    one = windows_of(chatty)[3]
    assert "" in one.pieces
    reading = simulator.read(one)
    assert len(reading.positions) == len(one)
    first = one.pieces.index("")
    assert reading.positions[first] == reading.positions[first + 1]
    forged = window(chatty("<|user|>", split_special_tokens=True, add_special_tokens=False).input_ids, chatty)
    assert chatty.convert_tokens_to_ids("<|user|>") not in simulator.read(forged).ids


def test_ten_levels_with_a_token_for_ten():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["10"])
    levels = digit_tokens(tokenizer)
    assert len(levels.ids) == 11 and levels.values == tuple(range(11))


def test_windows_of_another_tokenizer_are_read_where_their_tokens_end(tokenizer):
    whole = Window((900, 901, 902), ("the c", "", "at sat"))
    reading = read_window(whole, tokenizer)
    pieces = [tokenizer.decode([token]) for token in reading.ids]
    assert "".join(pieces) == "the cat sat"
    ends = np.cumsum([len(piece) for piece in pieces])
    for position, end in zip(reading.positions, piece_ends(whole.pieces), strict=True):
        assert ends[position] >= end and (position == 0 or ends[position - 1] < end)
    assert reading.positions[1] == reading.positions[2] == len(reading.ids) - 1
    positions, levels = levels_at_positions(reading, np.array([1.0, 7.0, 3.0]))
    assert positions == sorted(set(reading.positions))
    assert levels.tolist() == [1.0, 7.0]


def test_own_windows_are_read_by_id(tokenizer):
    for one in windows_of(tokenizer):
        assert read_window(one, tokenizer) == Reading(one.ids, tuple(range(len(one))))


def test_too_long_is_refused_in_words(tokenizer):
    simulator = FinetunedSimulator(wide_model(len(tokenizer), positions=16), tokenizer, own_card("base"))
    with pytest.raises(UserError, match=r"needs \d+ positions of the simulator, which has 16"):
        simulator.simulate(["cat " * 20], windows_of(tokenizer)[:1])


class Counting:
    def __init__(self):
        self.asked = []

    def simulate(self, descriptions, windows):
        self.asked += list(zip(descriptions, windows, strict=True))
        return [np.full(len(one), float(len(text))) for text, one in zip(descriptions, windows, strict=True)]


def test_equal_pairs_are_asked_for_once(tokenizer):
    counting = Counting()
    cached = CachedSimulator(counting, max_tokens=100)
    a, b, *_ = windows_of(tokenizer)
    first = cached.simulate(["x", "x", "yy", "x"], [a, b, a, a])
    assert [row[0] for row in first] == [1, 1, 2, 1]
    assert [len(row) for row in first] == [len(a), len(b), len(a), len(a)]
    assert len(counting.asked) == 3
    cached.simulate(["yy", "x"], [a, a])
    assert len(counting.asked) == 3
    small = CachedSimulator(counting, max_tokens=len(a))
    small.simulate(["x", "yy"], [a, a])
    small.simulate(["yy"], [a])
    assert len(counting.asked) == 5
    small.simulate(["x"], [a])
    assert len(counting.asked) == 6
