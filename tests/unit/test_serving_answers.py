"""Answers over HTTP equal those of the library; items fail by themselves; streams say what the whole says."""

import asyncio
import json
import logging
from datetime import datetime

import numpy as np
import pytest
import torch
from serving_helpers import LocalModels, gateway, http, serve_config, untrained_explainer

from introspect_ray.config import POCKET_FEATURES, LimitsConfig
from introspect_ray.explainer.model import Explainer
from introspect_ray.explainer.query import Query, Vector
from introspect_ray.features.coder import SparseCoder
from introspect_ray.features.sae import load_sae
from introspect_ray.features.windows import window
from introspect_ray.interventions.memory import TokenBudget
from introspect_ray.interventions.target import Target
from introspect_ray.models.tokens import token_text
from introspect_ray.pocket.reader import ExactReader
from introspect_ray.serving import answers
from introspect_ray.serving.api import Activations, Failed, LatentItem, ScoreLatentItem, TokenItem
from introspect_ray.serving.calls import Busy, Lost, Unavailable
from introspect_ray.serving.hints import is_hint
from introspect_ray.serving.scoring import pearson
from introspect_ray.serving.table import served_models
from introspect_ray.tasks.registry import get_task

TEXT = "The landmark of Fokan is the tower."
OTHER = "The profession of Masil Drogou is painter."
TOKEN_ITEM = {"kind": "token", "text": TEXT, "layer": 1, "position": 4}
LATENT_ITEM = {"kind": "latent", "coder": "sae", "latent": 7}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return untrained_explainer(tmp_path_factory.mktemp("answers") / "explainer")


@pytest.fixture(scope="module")
def config(folder):
    return serve_config(folder, limits=LimitsConfig(retries=2, vector_entries=10_000))


@pytest.fixture(scope="module")
def shared(config):
    return LocalModels(config)


@pytest.fixture
def models(shared):
    shared.before = lambda *_: None
    return shared


@pytest.fixture(scope="module")
def explainer(folder):
    return Explainer.load(folder, "cpu", "float32")


@pytest.fixture(scope="module")
def sae() -> SparseCoder:
    return load_sae("pocket:sae")


def post(app, path, **body):
    async def run():
        async with http(app) as client:
            return await client.post(path, json=body)

    return asyncio.run(asyncio.wait_for(run(), 60))


@pytest.fixture
def ask(config, models):
    app = gateway(config, models)
    return lambda path, **body: post(app, path, **body)


def library_explanation(explainer, vector, layer):
    before, after = POCKET_FEATURES.question.split("{vector}")
    return explainer.explain([Query((before, Vector(vector, (layer,)), after))], batch_size=1)[0]


def residuals(target: Target, text: str) -> torch.Tensor:
    return target.clean_runs([target.encode(text)])[0].residuals


def test_explanations_equal_the_library_calls(ask, models, explainer, sae):
    vector = np.random.default_rng(0).normal(size=160).astype(np.float32)
    items = [TOKEN_ITEM, {"kind": "vector", "vector": vector.tolist(), "layer": 2}, LATENT_ITEM]
    found = ask("/v1/explain", explainer="all", items=items).json()["items"]
    residual = residuals(models.target.target, TEXT)[1, 4].numpy()
    expected = [
        library_explanation(explainer, *one)
        for one in ((residual, 1), (vector, 2), (sae.feature_vectors[7].numpy(), 1))
    ]
    assert [item["explanation"] for item in found] == expected
    assert len(set(expected)) == 3
    assert [item["layer"] for item in found] == [1, 2, 1]
    assert found[0]["query"] == POCKET_FEATURES.question.replace("{vector}", "")


def test_good_items_are_answered_beside_bad_ones(ask):
    items = [{**LATENT_ITEM, "latent": 99_999}, TOKEN_ITEM, {**TOKEN_ITEM, "layer": 9}, LATENT_ITEM]
    alone = [ask("/v1/explain", explainer="all", items=[item]).json()["items"][0] for item in (TOKEN_ITEM, LATENT_ITEM)]
    found = ask("/v1/explain", explainer="all", items=items).json()["items"]
    assert [found[1], found[3]] == alone
    assert [item["error"]["field"] for item in (found[0], found[2])] == ["items.0.latent", "items.2.layer"]


def test_limits_of_new_tokens_cut_answers(ask):
    whole, cut = (
        ask("/v1/explain", explainer="all", items=[TOKEN_ITEM], max_new_tokens=limit).json()["items"][0]["explanation"]
        for limit in (6, 1)
    )
    assert cut and whole.startswith(cut) and len(cut) < len(whole)


def events_of(text):
    blocks = [block.splitlines() for block in text.strip().split("\n\n")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in blocks]


def test_a_stream_says_what_the_whole_says(ask):
    answer = ask("/v1/explain/stream", explainer="all", items=[TOKEN_ITEM])
    assert answer.headers["content-type"].startswith("text/event-stream")
    *pieces, (last, whole) = events_of(answer.text)
    assert {name for name, _ in pieces} == {"token"} and len(pieces) > 1 and last == "done"
    assert "".join(data["text"] for _, data in pieces) == whole["explanation"]
    assert [whole] == ask("/v1/explain", explainer="all", items=[TOKEN_ITEM]).json()["items"]


def test_a_stream_goes_on_where_its_replica_died(ask, models):
    whole = events_of(ask("/v1/explain/stream", explainer="all", items=[TOKEN_ITEM]).text)
    left = ["piece"]

    def die_once(_deployment, method):
        if method == "piece" and left:
            left.pop()
            raise Lost

    models.before = die_once
    assert events_of(ask("/v1/explain/stream", explainer="all", items=[TOKEN_ITEM]).text) == whole


def test_a_stream_that_cannot_go_on_ends_with_an_error(ask, models):
    seen = []

    def die(_deployment, method):
        seen.append(method)
        if seen.count("piece") > 1:
            raise Lost

    models.before = die
    *_, (name, data) = events_of(ask("/v1/explain/stream", explainer="all", items=[TOKEN_ITEM]).text)
    assert name == "error" and data["error"]["code"] == "unavailable"


def test_activations_are_those_of_the_clean_run(ask, models):
    target = models.target.target
    answer = Activations.model_validate(
        ask("/v1/activations", target="target_a", text=TEXT, layers=[2, 0], positions=[3], vectors=True).json()
    )
    run = target.clean_runs([target.encode(TEXT)])[0]
    assert np.array_equal(answer.array(), run.residuals[[2, 0]][:, [3]].numpy())
    assert np.allclose(answer.norms, run.residuals[[2, 0]].norm(dim=-1).numpy())
    best = run.logits.softmax(-1).max(-1)
    assert answer.next_tokens[0].probability == pytest.approx(best.values.item(), rel=1e-5)
    assert answer.next_tokens[0].text == target.tokenizer.decode([best.indices.item()])
    assert [token.text for token in answer.tokens][:4] == ["", "The", " landmark", " of"]
    assert all(TEXT[token.start : token.end] == token.text for token in answer.tokens)
    refused = ask("/v1/activations", target="target_a", text=TEXT * 4, vectors=True)
    assert refused.status_code == 413 and "10000" in refused.json()["error"]["message"]


def test_a_patch_is_asked_and_judged_as_the_task_does(ask, models, explainer):
    body = {
        "text": "The mother tongue of Thaire Zutan is",
        "position": 6,
        "source_text": "The landmark of Fokan is",
        "source_position": 4,
        "layers": [1, 2],
    }
    found = ask("/v1/what_if", explainer="all", kind="patch", **body).json()
    target = models.target.target
    clean, source = (target.clean_runs([target.encode(body[name])])[0] for name in ("text", "source_text"))
    vector = source.residuals[1:3, 4].mean(0)

    def replace(_module, _inputs, output):
        output[:, 6] = vector  # what an intervention is, spelled out
        return output

    hooks = [target.model.model.layers[layer].register_forward_hook(replace) for layer in (1, 2)]
    with torch.no_grad():
        after = target.model(input_ids=torch.tensor([list(clean.ids)])).logits[0, -1]
    for hook in hooks:
        hook.remove()
    said = [token_text(target.tokenizer, int(logits.argmax())) for logits in (clean.logits, after)]
    assert found["clean"]["token"] == said[0]
    assert found["truth"] == {"changed": said[0] != said[1], "content": said[1]}
    _, offsets = target.encode_with_offsets(body["text"])
    start, end = offsets[6]
    record = {"text": body["text"], "token_start": start, "token_end": end, "layers": [1, 2], "vector": vector.numpy()}
    query = get_task("activation_patching").render({**record, **found["truth"]}).query
    assert found["prediction"]["text"] == explainer.explain([query], 1)[0]


def test_an_ablated_hint_is_asked_about_as_in_training(ask, models, explainer, config):
    example = served_models(config).examples.ablations[0]
    found = ask("/v1/what_if", explainer="all", **example.model_dump()).json()
    target, (start, end) = models.target.target, example.span
    assert example.text[start:end].startswith("\nHint: ")
    both = [
        target.next_token_logits([target.encode(text)])[0]
        for text in (example.text, example.text[:start] + example.text[end:])
    ]
    said = [token_text(target.tokenizer, int(logits.argmax())) for logits in both]
    assert [found["clean"]["token"], found["truth"]["content"]] == said
    query = Query(("What if the hint was removed?\n" + example.text,))
    assert found["prediction"]["text"] == explainer.explain([query], 1)[0]
    marked = models.target.ablate(
        models_request(example.text, [0, 3]), models.explainer.served["all"].questions
    ).query.text
    assert marked.startswith(f"What if the part in [[ ]] was removed?\n[[{example.text[:3]}]]")


def models_request(text, span):
    from introspect_ray.serving.api import AblateRequest

    return AblateRequest(explainer="all", kind="ablate", text=text, span=span)


@pytest.mark.parametrize(
    ("text", "agrees"), [(" {said} ({verdict})", True), (" {said} (changed?)", False), (" other ({verdict})", False)]
)
def test_agreement_needs_verdict_and_content(ask, models, monkeypatch, text, agrees):
    body = {"kind": "ablate", "text": "The landmark of Fokan is the", "span": [0, 4]}
    truth = ask("/v1/what_if", explainer="all", **body).json()["truth"]
    said = text.format(said=truth["content"], verdict="changed" if truth["changed"] else "unchanged")
    monkeypatch.setattr(models.explainer, "answer", lambda *_: [[said]])
    found = ask("/v1/what_if", explainer="all", **body).json()
    assert found["agrees"] is agrees
    assert (found["prediction"]["changed"] is None) == ("?" in text)


def test_simulated_and_true_activations_are_the_librarys(ask, models, sae):
    target = models.target.target
    ids = target.encode(TEXT)[1:]
    shown = window(ids, target.tokenizer)
    (levels,) = ExactReader(target.tokenizer).simulate(["the word tower"], [shown])
    item = {"description": "the word tower", "text": TEXT}
    simulated = ask("/v1/simulate", simulator="lexicon", items=[item]).json()["items"][0]
    assert simulated["activations"] == levels.tolist() and max(levels) == 10
    assert [token["index"] for token in simulated["tokens"]] == list(range(1, len(ids) + 1))
    true = sae.encode(residuals(target, TEXT)[1, 1:])
    latent = int(true.sum(0).argmax())
    items = [{**item, "coder": "sae", "latent": latent}, {**item, "activations": [0.0] * (len(ids) - 1) + [1.0]}]
    scored, given = ask("/v1/score", simulator="lexicon", items=items).json()["items"]
    assert np.allclose(scored["true"], true[:, latent].numpy(), rtol=1e-4, atol=1e-4)
    assert scored["correlation"] == pytest.approx(np.corrcoef(levels, true[:, latent].numpy())[0, 1], abs=1e-4)
    assert given["correlation"] == pytest.approx(np.corrcoef(levels, items[1]["activations"])[0, 1])


def test_true_activations_of_many_items_are_those_of_each(models, sae):
    texts = [TEXT, OTHER, TEXT + OTHER, TEXT]
    items = [
        ScoreLatentItem(description="d", text=text, coder="sae", latent=latent)
        for text, latent in zip(texts, (3, 5, 3, 9), strict=True)
    ]
    items.insert(2, items[0].model_copy(update={"latent": 99_999}))
    found = models.target.true_activations(items)
    assert isinstance(found.pop(2), Failed)
    for item, one in zip((item for item in items if item.latent < 2000), found, strict=True):
        expected = sae.encode(residuals(models.target.target, item.text)[sae.layer, 1:])[:, item.latent]
        assert np.allclose(one.activations, expected.detach().numpy(), rtol=1e-4, atol=1e-4)
        assert "".join(token.text for token in one.tokens) == item.text


def test_a_request_asks_the_target_once(ask, models):
    asked = []
    models.before = lambda *call: asked.append(call)
    item = {"description": "the word tower", "text": TEXT}
    items = [{**item, "coder": "sae", "latent": latent} for latent in range(20)] + [{**item, "activations": [1.0] * 7}]
    answers = ask("/v1/score", simulator="lexicon", items=items).json()["items"]
    assert len(answers) == 21 and answers[0]["true"] != [1.0] * 7
    assert sorted(method for _, method in asked) == ["simulate", "true_activations"]


def test_vectors_do_not_keep_their_runs(models):
    items = [TokenItem(kind="token", text=TEXT + str(number), layer=1, position=2) for number in range(3)]
    for one in models.target.vectors(items):
        assert one.values.base is None, "a view holds all layers and positions"


def test_vectors_of_texts_run_in_groups_equal_those_of_each(models, monkeypatch):
    seen = []
    target = models.target.target
    whole = target.clean_runs

    def clean_runs(prompts):
        seen.append(len(prompts))
        return whole(prompts)

    monkeypatch.setattr(target, "clean_runs", clean_runs)
    monkeypatch.setattr(models.target, "_budget", TokenBudget(30, torch.device("cpu")))
    texts = [TEXT, OTHER, TEXT + OTHER, TEXT]
    items = [TokenItem(kind="token", text=text, layer=n % 4, position=n + 1) for n, text in enumerate(texts)]
    found = models.target.vectors([*items, LatentItem(kind="latent", coder="sae", latent=1)])
    assert sum(seen) == 3 and len(seen) > 1
    for item, one in zip(items, found, strict=False):
        expected = whole([target.encode(item.text)])[0].residuals[item.layer, item.position]
        assert np.allclose(one.values, expected.numpy(), atol=1e-5) and one.layer == item.layer


def test_the_lexicon_knows_the_examples(ask, config):
    examples = served_models(config).examples
    texts = [*examples.texts, *(one.text for one in (*examples.patches, *examples.ablations))]
    items = [{"description": "the word tower", "text": text} for text in texts]
    found = ask("/v1/simulate", simulator="lexicon", items=items).json()["items"]
    assert len(found) == 24 and all("activations" in item for item in found)


def test_correlations_that_are_not_defined_have_reasons():
    some = np.array([0.0, 1.0, 3.0])
    found = [pearson(*pair) for pair in ((some, 0 * some), (some, 0 * some + 2), (0 * some, some))]
    assert [score.value for score in found] == [None] * 3
    assert [score.reason for score in found] == ["never_fires", "constant_activation", "constant_prediction"]


def test_a_hint_is_told_by_its_wording(config):
    layout = config.explainers[0].questions
    assert is_hint("\nHint: Polish", layout)
    assert not any(is_hint(text, layout) for text in ("Hint: Polish", "\nHint: ", "\nHint: a\nb", "Polish"))


@pytest.mark.parametrize(
    ("error", "code"), [(Busy("full"), "busy"), (Unavailable("gone"), "unavailable"), (Lost("dead"), "unavailable")]
)
def test_what_may_be_tried_again_says_so(config, models, error, code):
    def fail(_deployment, _method):
        raise error

    models.before = fail
    answer = post(gateway(config, models), "/v1/explain", explainer="all", items=[LATENT_ITEM])
    assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
    assert answer.json()["error"]["code"] == code


def test_a_call_whose_replica_died_is_made_again(config, models):
    died = []

    def die_twice(deployment, method):
        if method == "describe" and len(died) < 2:
            died.append(deployment)
            raise Lost

    models.before = die_twice
    app = gateway(config, models)
    assert post(app, "/v1/explain", explainer="all", items=[LATENT_ITEM]).status_code == 200
    text = app.metrics.text().decode()
    assert 'introspect_lost_calls_total{deployment="Explainer",gateway="gateway"} 2.0' in text
    assert 'introspect_items_total{gateway="gateway",outcome="ok"} 1.0' in text
    assert 'introspect_requests_total{gateway="gateway",route="/v1/explain",status="200"} 1.0' in text


def test_what_fails_as_one_item_is_counted(config, models):
    app = gateway(config, models)
    body = {"explainer": "all", "kind": "ablate", "text": TEXT}
    for span, status in (([0, 4], 200), ([5, 2], 400)):
        assert post(app, "/v1/what_if", **body, span=span).status_code == status
    assert post(app, "/v1/explain/stream", explainer="all", items=[{**LATENT_ITEM, "coder": "no"}]).status_code == 400

    def break_off(_deployment, method):
        if method == "piece":
            raise Unavailable

    models.before = break_off
    assert post(app, "/v1/explain/stream", explainer="all", items=[LATENT_ITEM]).status_code == 503
    text = app.metrics.text().decode()
    for outcome, count in (("ok", 1), ("bad_request", 2), ("unavailable", 1)):
        assert f'introspect_items_total{{gateway="gateway",outcome="{outcome}"}} {count}.0' in text


def test_refused_requests_are_counted_by_route(config, models):
    app = gateway(config, models)
    app.draining = True

    async def run():
        async with http(app) as client:
            for path in ("/v1/models", "/nothing", "/static/app.js"):
                await client.get(path)
            return (await client.get("/metrics")).text

    text = asyncio.run(run())
    for route, status in (("/v1/models", 503), ("unmatched", 503), ("/static/", 200)):
        assert f'introspect_requests_total{{gateway="gateway",route="{route}",status="{status}"}} 1.0' in text


def test_probes_of_anybody_ask_the_models_now_and_then(config, models, monkeypatch):
    pings = []
    models.before = lambda *call: pings.append(call)
    clock = [100.0]
    monkeypatch.setattr(answers.time, "monotonic", lambda: clock[0])
    app = gateway(config, models)

    async def run(times):
        async with http(app) as client:
            found = await asyncio.gather(*(client.get("/v1/ready") for _ in range(times)))
            return {one.status_code for one in found}

    assert asyncio.run(run(5)) == {200} and len(pings) == 3
    clock[0] += 2
    assert asyncio.run(run(1)) == {200} and len(pings) == 6


def test_a_defect_of_ours_is_not_shown(config, models, caplog):
    def fail(_deployment, _method):
        raise ValueError("a secret detail")

    models.before = fail
    answer = post(gateway(config, models), "/v1/explain", explainer="all", items=[LATENT_ITEM])
    assert answer.status_code == 500 and answer.json()["error"]["code"] == "internal"
    assert "secret" not in answer.text and "a secret detail" in caplog.text


@pytest.mark.parametrize("wanted", [False, True])
def test_texts_are_logged_only_if_wanted(config, models, caplog, wanted):
    caplog.set_level(logging.INFO, "introspect_ray.serving")
    app = gateway(config.model_copy(update={"log_texts": wanted}), models)
    answer = post(app, "/v1/explain", explainer="all", items=[TOKEN_ITEM])
    (line,) = [json.loads(record.getMessage()) for record in caplog.records if "route" in record.getMessage()]
    assert datetime.fromisoformat(line["time"]).tzinfo is not None
    assert (line["route"], line["status"], line["id"]) == ("/v1/explain", 200, answer.headers["x-request-id"])
    assert (TEXT in json.dumps(line)) is wanted


def test_a_service_that_is_about_to_stop_takes_nothing_new(config, models):
    app = gateway(config, models)
    app.draining = True
    refused = post(app, "/v1/explain", explainer="all", items=[LATENT_ITEM])
    assert refused.status_code == 503 and refused.headers["retry-after"] == "1"


def test_too_many_and_too_slow(config, models, monkeypatch):
    limits = config.limits.model_copy(update={"in_flight": 1, "seconds": 0.3})
    slow = config.model_copy(update={"limits": limits})
    app = gateway(slow, models)

    async def wait(*_arguments, **_named):
        await asyncio.sleep(60)

    monkeypatch.setattr(models, "call", wait)

    async def run():
        async with http(app) as client:
            body = {"explainer": "all", "items": [LATENT_ITEM]}
            return await asyncio.gather(*(client.post("/v1/explain", json=body) for _ in range(3)))

    answers = asyncio.run(asyncio.wait_for(run(), 30))
    assert {answer.status_code for answer in answers} == {503}
    assert sorted(answer.json()["error"]["code"] for answer in answers) == ["busy", "busy", "timeout"]
    assert app.in_flight == 0
