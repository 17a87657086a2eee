"""The service on a local Ray: answers equal the library's, killed replicas lose no request, an update drops nothing."""

import os
import signal
import threading
import time
from functools import lru_cache
from urllib.parse import urlencode

import numpy as np
import pytest
import ray
import torch
from ray import serve
from serving_helpers import TARGET

from introspect_ray.config import (
    POCKET_FEATURES,
    ExplainerConfig,
    LoraConfig,
    ReplicaConfig,
    ServeConfig,
    ServedCoder,
    ServedExplainer,
    ServedSimulator,
    ServedTarget,
)
from introspect_ray.explainer.card import TargetInfo
from introspect_ray.explainer.model import Explainer
from introspect_ray.explainer.query import Query, Vector
from introspect_ray.features.sae import load_sae
from introspect_ray.interventions.target import Target
from introspect_ray.serving.api import LatentItem, SimulateItem, TokenItem, VectorItem
from introspect_ray.serving.app import application
from introspect_ray.serving.client import Client, Retries
from introspect_ray.serving.run import APPLICATION, serving

pytestmark = pytest.mark.timeout(400)
TEXT = "The landmark of Fokan is the tower."
NAMES = ("one", "two")
REPLICAS = ReplicaConfig(num_cpus=0.1, health_check_period_s=1)
KINDS = ("TargetModel-target_a", "Explainer", "Simulator-lexicon", "Gateway")


def write_adapters(place):
    """Two adapters of one base that answer differently; their folders by name."""
    folders = {}
    for number, name in enumerate(NAMES):
        info = TargetInfo(path="pocket:target_a", width=160, num_layers=4)
        explainer = Explainer.create(ExplainerConfig(model=TARGET, max_new_tokens=4), info, seed=0)
        explainer.add_adapter(LoraConfig(rank=4, alpha=8, dropout=0), seed=number)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for key, parameter in explainer.model.named_parameters():
                if ".lora_B." in key:
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        folders[name] = str(place / name)
        explainer.save(folders[name])
    return folders


def config_of(folders, **changes):
    return ServeConfig(
        port=0,
        quickstart=None,
        targets=(ServedTarget(model=TARGET, coders=(ServedCoder(),), replicas=REPLICAS),),
        explainers=tuple(
            ServedExplainer(name=name, folder=folder, features=POCKET_FEATURES) for name, folder in folders.items()
        ),
        explainer_replicas=REPLICAS,
        simulators=(ServedSimulator(name="lexicon", kind="lexicon", replicas=REPLICAS),),
        gateway=REPLICAS,
        **changes,
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_adapters(tmp_path_factory.mktemp("serving"))


@pytest.fixture(scope="module")
def service(folders):
    with serving(config_of(folders)) as running:
        yield running
    assert not ray.is_initialized()


@pytest.fixture(scope="module")
def expected(folders):
    """(explainer, item) -> what the library says."""
    target, sae = Target.load(TARGET), load_sae("pocket:sae")
    residual = target.clean_runs([target.encode(TEXT)])[0].residuals[1, 4].numpy()
    vector = np.random.default_rng(0).normal(size=160).astype(np.float32)
    items = (
        TokenItem(kind="token", text=TEXT, layer=1, position=4),
        VectorItem(kind="vector", vector=vector.tolist(), layer=2),
        LatentItem(kind="latent", coder="sae", latent=7),
    )
    vectors = Vector(residual, (1,)), Vector(vector, (2,)), Vector(sae.feature_vectors[7].numpy(), (1,))
    before, after = POCKET_FEATURES.question.split("{vector}")
    found = []
    for name in NAMES:
        explainer = Explainer.load(folders[name], "cpu", "float32")
        texts = explainer.explain([Query((before, value, after)) for value in vectors], 1)
        found += [(name, item, text) for item, text in zip(items, texts, strict=True)]
    return found


class Load:
    """Clients that ask without pause inside the block, and compare every answer with the library's."""

    def __init__(self, url, expected, clients=4, retries=20):
        self._url = url
        self._expected = expected
        self._clients = clients
        self._retries = Retries(most=retries)
        self._stop = threading.Event()
        self.answered = 0
        self.wrong = []

    def _ask(self, number):
        with Client(self._url, retries=self._retries) as client:
            while not self._stop.is_set():
                for name, item, text in self._expected[number % 2 :: 2]:
                    try:
                        (answer,) = client.explain(name, [item])
                        said = answer.explanation
                        (levels,) = client.simulate("lexicon", [SimulateItem(description="the word tower", text=TEXT)])
                        ok = said == text and max(levels.activations) == 10
                    except Exception as error:
                        ok, said = False, repr(error)
                    self.answered += 1
                    if not ok:
                        self.wrong.append((name, item.kind, said, text))

    def __enter__(self):
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(self._clients)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        for thread in self._threads:
            thread.join()


@lru_cache
def handle_of(kind):
    return serve.get_deployment_handle(kind, APPLICATION)


def process_of(kind):
    """Process id of the one replica of a deployment; None while there is none that answers."""
    try:
        (found,) = handle_of(kind).broadcast("ping").results(timeout_s=5)
    except Exception:
        return None
    return found


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found


def test_answers_equal_the_library_calls(service, expected):
    with Client(service.url) as client:
        for name, item, text in expected:
            (answer,) = client.explain(name, [item])
            assert answer.explanation == text
            *pieces, whole = client.explain_stream(name, item)
            assert "".join(pieces) == whole.explanation == text
        both = [client.explain(name, [item for _, item, _ in expected[:3]]) for name in NAMES]
    texts = [[one.explanation for one in answers] for answers in both]
    assert [*texts[0], *texts[1]] == [text for *_, text in expected]
    assert texts[0] != texts[1]


def test_no_request_is_lost_with_replicas(service, expected):
    with Load(service.url, expected) as load:
        for kinds in (KINDS[:2], KINDS[2:]):
            killed = {kind: wait_for(lambda kind=kind: process_of(kind)) for kind in kinds}
            for process in killed.values():
                os.kill(process, signal.SIGKILL)
            for kind, process in killed.items():
                wait_for(lambda kind=kind, process=process: process_of(kind) not in (None, process))
            seen = load.answered
            wait_for(lambda seen=seen: load.answered > seen + 8)
    assert not load.wrong


def test_an_update_drops_nothing(service, folders, expected):
    before = {kind: wait_for(lambda kind=kind: process_of(kind)) for kind in KINDS}
    with Load(service.url, expected, retries=0) as load:
        wait_for(lambda: load.answered > 4)
        changed = config_of(folders, batching={"max_size": 4})
        serve.run(application(changed, service.models, digest=None), name=APPLICATION, route_prefix="/")
        wait_for(lambda: process_of("Explainer") not in (None, before["Explainer"]))
        seen = load.answered
        wait_for(lambda: load.answered > seen + 8)
    assert not load.wrong
    after = {kind: wait_for(lambda kind=kind: process_of(kind)) for kind in KINDS}
    assert all(after[kind] != before[kind] for kind in KINDS if not kind.startswith("Simulator"))


def test_the_page_shows_what_the_library_says(service, expected, new_page):
    expect = pytest.importorskip("playwright.sync_api").expect
    name, item, text = expected[0]
    view = {"text": item.text, "explainer": name, "layer": item.layer, "token": item.position}
    page = new_page()
    page.goto(f"{service.url}/#{urlencode(view)}")
    expect(page.locator("#explanation blockquote")).to_have_text(text, timeout=30_000)
    with Client(service.url) as client:
        (levels,) = client.simulate("lexicon", [SimulateItem(description=text, text=item.text)])
    shown = page.locator("ol.heat .level.simulated")
    expect(shown).to_have_count(len(levels.activations), timeout=30_000)
    found = [float(level.get_attribute("title").removeprefix("simulated: ")) for level in shown.all()]
    assert found == levels.activations
