"""Latents described by models on Ray actors: the same words as in one process, however many actors there are."""

import os
import time
from types import SimpleNamespace

import pytest
import torch
from exemplar_helpers import exemplar
from explainer_helpers import tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

import introspect_ray.training.describe as describe_module
from introspect_ray.config import (
    POCKET_FEATURES,
    ActorConfig,
    ChatConfig,
    DescribeConfig,
    ExplainerConfig,
    LocalChatConfig,
    ModelConfig,
)
from introspect_ray.data.chat_pool import chat_model
from introspect_ray.data.cluster import connect
from introspect_ray.data.description_files import read_descriptions
from introspect_ray.data.workers import WorkerPool
from introspect_ray.errors import RunFailed, UserError
from introspect_ray.explainer.card import TargetInfo
from introspect_ray.explainer.model import Explainer
from introspect_ray.explainer.query import Query, Vector
from introspect_ray.features.describing import description_question, parse_description
from introspect_ray.features.exemplars import LatentExemplars
from introspect_ray.features.sae import load_sae
from introspect_ray.models.chat import Completion, ask
from introspect_ray.models.journal import Journal
from introspect_ray.models.local_chat import LocalChat
from introspect_ray.training.describe import describe_latents

WORDS = ("Paris", "Rome", "Oslo", "Bern", "Cairo")
TWO = ActorConfig(initial_size=2, max_size=2)


class Store:
    meta = SimpleNamespace(run_key="exemplars of a test", coder_digest="one")

    def latents(self):
        return [SimpleNamespace(layer=1, latent=n) for n in range(len(WORDS))]

    def read(self, latent, split):  # noqa: ARG002
        return LatentExemplars(1, latent, 0.1, 4.0, (exemplar(["She", " lives", f" in {WORDS[latent]}"], {2: 4.0}),))


@pytest.fixture(scope="module", autouse=True)
def _cluster():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        with connect():
            yield


def talkative(folder):
    """A random model that reads whole prompts, byte by byte, and says some letters."""
    text = tokenizer()
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(**shape, vocab_size=len(text), max_position_embeddings=4096, initializer_range=0.2)
        LlamaForCausalLM(config).save_pretrained(folder)
    text.save_pretrained(folder)
    return ModelConfig(path=str(folder))


def test_a_local_chat_model_on_actors_says_what_it_says_in_one_process(tmp_path, monkeypatch):
    monkeypatch.setattr(describe_module, "open_exemplars", lambda _: Store())
    model = talkative(tmp_path / "model")
    chat = ChatConfig(local=LocalChatConfig(model=model, batch_size=2), max_tokens=12, temperature=0.8)
    config = DescribeConfig(
        method="chat",
        output=str(tmp_path / "out"),
        chat=chat,
        num_candidates=2,
        actors=TWO,
        max_failed_share=1.0,
        seed=3,
    )
    summary = describe_latents(config, lambda *_: None)
    alone = LocalChat.load(chat, seed=3)
    expected = {}
    for latent in range(len(WORDS)):
        question = description_question(Store().read(latent, "train"), config.prompt)
        answers = [alone.complete([question], sample)[0] for sample in range(2)]
        said = [parse_description(one) for one in answers if isinstance(one, Completion)]
        expected[latent] = list(dict.fromkeys(text for text in said if isinstance(text, str)))
    found = {latent: [] for latent in expected}
    for one in read_descriptions(str(tmp_path / "out")):
        found[one.latent].append(one.text)
        assert (one.layer, one.source) == (1, "llm:model")
    assert found == expected and summary.num_latents == len(WORDS)
    assert sum(map(len, found.values())) > len(WORDS)


def test_choices_on_actors_come_in_order_and_a_broken_model_is_the_users_error(tmp_path):
    config = ChatConfig(local=LocalChatConfig(batch_size=2))
    questions = [ask(f"{word} is a city. " * (n + 1)) for n, word in enumerate(WORDS)]
    with chat_model(config, ActorConfig(), 0, Journal()) as model:
        found = model.choose(questions, ("yes", "no"))
    expected = LocalChat.load(config, seed=0).choose(questions, ("yes", "no"))
    for one, other in zip(found, expected, strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, rel=1e-4)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    broken = ChatConfig.model_validate({"local": {"model": {"path": str(tmp_path)}}})
    with (
        pytest.raises(UserError, match="could not be loaded"),
        chat_model(broken, ActorConfig(), 0, Journal()) as model,
    ):
        model.complete(questions)


def test_an_explainer_on_actors_describes_decoder_rows(tmp_path):
    card = TargetInfo(path="pocket:target_a", width=160, num_layers=4)
    explainer = Explainer.create(ExplainerConfig(max_new_tokens=6), card, seed=0)
    explainer.save(str(tmp_path / "mine"))
    config = DescribeConfig(
        method="explainer",
        explainer=str(tmp_path / "mine"),
        output=str(tmp_path / "out"),
        features=POCKET_FEATURES,
        limit=6,
        latents_per_shard=4,
        actors=TWO,
        max_failed_share=1.0,
    )
    describe_latents(config, lambda *_: None)
    coder = load_sae("pocket:sae")
    before, after = config.features.question.replace("{layer}", "1").split("{vector}")
    queries = [Query((before, Vector(coder.feature_vectors[n].float().numpy(), (1,)), after)) for n in range(6)]
    said = [parse_description(Completion(text, 0, 0)) for text in explainer.explain(queries, 6)]
    found = read_descriptions(str(tmp_path / "out"))
    assert [(one.latent, one.text) for one in found] == [
        (latent, text) for latent, text in enumerate(said) if isinstance(text, str)
    ]
    assert {one.source for one in found} == {"explainer:mine"}


def worker():
    """A class of actors; made here, so that it ships by its content and not by the name of this file."""

    class Worker:
        def __init__(self, fault=None):
            if fault:
                raise fault

        def ask(self, question):
            """The question and which process hears it; one ends the process, others are refused."""
            if question == "deadly":
                os._exit(1)
            if question == "bad":
                raise UserError("a bad question")
            if question == "broken":
                raise ValueError("a broken\nworker")
            time.sleep(0.05 if question % 3 else 0.3)
            return question, os.getpid()

    return Worker


def test_a_pool_grows_to_its_largest_size_and_answers_in_order_whatever_has_no_place():
    pool = WorkerPool(worker(), (), ActorConfig(num_cpus=0.4, max_size=3))
    found = list(pool.map("ask", [(n,) for n in range(40)]))
    assert [number for number, _ in found] == list(range(40))
    assert len({process for _, process in found}) == pool.size == 3
    endless = WorkerPool(worker(), (), ActorConfig(num_cpus=0.4, max_size=99))
    assert [number for number, _ in endless.map("ask", [(n,) for n in range(30)])] == list(range(30))
    assert next(endless.map("ask", [(7,), (8,)]))[0] == 7
    assert [number for number, _ in endless.map("ask", [(4,)])] == [4], "what nobody waited for is no answer"
    assert len(list(WorkerPool(worker(), (), ActorConfig(initial_size=9, max_size=9)).map("ask", []))) == 0


@pytest.mark.parametrize(
    ("fault", "question", "kind", "said"),
    [
        (UserError("no such model"), 0, UserError, "no such model"),
        (None, "bad", UserError, "a bad question"),
        (None, "broken", RunFailed, "an actor failed: .*worker"),
        (
            None,
            "deadly",
            RunFailed,
            "an actor failed: .*; the same command tries again",
        ),
    ],
)
def test_what_actors_fail_of_is_said_in_one_line(fault, question, kind, said):
    with pytest.raises(kind, match=f"^{said}") as error:
        list(WorkerPool(worker(), (fault,), ActorConfig(num_cpus=0.1)).map("ask", [(question,)]))
    assert type(error.value) is kind and "\n" not in str(error.value)
