"""Adapters of one base in one model answer as each does alone; pieces of a stream are the answer."""

import pytest
import torch
from explainer_helpers import explainer, queries

from introspect_ray.config import LoraConfig
from introspect_ray.explainer.model import Explainer
from introspect_ray.explainer.sharing import ExplainerPool
from introspect_ray.explainer.streaming import AnswerStreamer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two adapters of one base that answer differently, and a whole explainer."""
    place = tmp_path_factory.mktemp("sharing")
    made = {}
    for number, name in enumerate(("a.b", "a_b", "whole")):
        one = explainer(place / "base")
        if name != "whole":
            one.add_adapter(LoraConfig(rank=4, alpha=64, dropout=0), seed=number)
            generator = torch.Generator().manual_seed(number)
            with torch.no_grad():
                for key, parameter in one.model.named_parameters():
                    if ".lora_B." in key:
                        parameter.copy_(torch.randn(parameter.shape, generator=generator))
        made[name] = str(place / name)
        one.save(made[name])
    return made


@pytest.fixture(scope="module")
def alone(folders):
    return {name: Explainer.load(folder, "cpu", "float32").explain(queries(4), 4) for name, folder in folders.items()}


def test_each_answers_as_alone_whichever_was_used_before(folders, alone):
    assert len({tuple(texts) for texts in alone.values()}) == 3
    pool = ExplainerPool(folders, "cpu", most=3)
    for name in ("a.b", "a_b", "whole", "a.b", "a_b", "a.b"):
        assert pool.use(name).explain(queries(4), 4) == alone[name]
    assert pool.use("a.b").model is pool.use("a_b").model is not pool.use("whole").model


def test_the_one_unused_for_longest_makes_room(folders, alone):
    pool = ExplainerPool(folders, "cpu", most=2)
    for name in ("a.b", "a_b", "a.b", "whole"):
        pool.use(name)
    assert pool.loaded == ("a.b", "whole")
    assert pool.use("a.b").explain(queries(4), 4) == alone["a.b"]
    assert pool.use("a_b").explain(queries(4), 4) == alone["a_b"]  # loaded again, beside the one that stayed
    assert pool.loaded == ("a.b", "a_b")


def stream(one, query, stop=lambda: False):
    pieces = []
    (encoded,) = one.encode([query], None)
    (text,) = one.answer([encoded], 1, streamer=AnswerStreamer(one.encoder.decode, pieces.append, stop))
    return pieces, text


def test_pieces_of_a_stream_are_the_answer(folders, alone):
    one = Explainer.load(folders["whole"], "cpu", "float32")
    for query, whole in zip(queries(4), alone["whole"], strict=True):
        pieces, text = stream(one, query)
        assert "".join(pieces) == text == whole


def test_a_stream_may_be_stopped(folders):
    one = Explainer.load(folders["whole"], "cpu", "float32")
    asked = []

    def stop():
        asked.append(True)
        return len(asked) == 2

    stream(one, queries(1)[0], stop)
    assert len(asked) == 2


def test_a_token_that_is_part_of_a_character_waits():
    characters = {1: b"\xc3", 2: b"\xa9", 3: b"b"}
    pieces = []
    streamer = AnswerStreamer(
        lambda ids: b"".join(characters[one] for one in ids).decode("utf-8", "replace"), pieces.append, lambda: False
    )
    for token in (3, 1, 2, 3, 1):
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert pieces == ["b", "é", "b", "\N{REPLACEMENT CHARACTER}"]


def test_longer_answers_are_asked_for_with_room_for_them(folders):
    one = Explainer.load(folders["whole"], "cpu", "float32")
    (encoded,) = one.encode(queries(1), None, max_new_tokens=2)
    short, usual = (one.answer([encoded], 1, max_new_tokens=limit)[0] for limit in (2, None))
    assert usual.startswith(short) and len(short) < len(usual)
    from introspect_ray.errors import UserError

    with pytest.raises(UserError, match="the explainer reads at most 256"):
        one.encode(queries(1), None, max_new_tokens=250)
