"""Scores by language models as a job: every description and control scored, failures counted, runs that go on."""

import json
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
from chat_server import Reply, chat_server, said
from exemplar_helpers import Failure, ScriptedChat, exemplar

import introspect_ray.training.judge_descriptions as judge_module
from introspect_ray.config import ConvertDescriptionsConfig, JudgeDescriptionsConfig
from introspect_ray.data.convert_descriptions import convert_descriptions, read_descriptions
from introspect_ray.data.description_files import coder_digest_of, write_coder_digest
from introspect_ray.data.storage import Folder
from introspect_ray.errors import RunFailed, UserError
from introspect_ray.features.descriptions import Description, description_lines
from introspect_ray.features.exemplars import LatentExemplars
from introspect_ray.training.judge_descriptions import judge_descriptions

WORDS = ("cat", "dog", "town")


class FakeStore:
    """Latent n fires on WORDS[n]."""

    url = "exemplars"
    meta = SimpleNamespace(run_key="test", layer=1, coder="pocket:sae", coder_digest="one")

    def latents(self):
        return [SimpleNamespace(layer=1, latent=n) for n in range(len(WORDS))]

    def read(self, latent, split):
        assert split == "test"
        fires = [exemplar([f"{n}: the", f" {WORDS[latent]}"], {1: 5.0}, "quantile", n) for n in range(4)]
        silent = [exemplar([f"{n}: it", " rains"], {}, "random") for n in range(6)]
        top = [exemplar(["x", WORDS[latent]], {1: 5.0}), exemplar(["0: the", f" {WORDS[latent]}"], {1: 5.0})]
        return LatentExemplars(1, latent, 0.1, 5.0, (*top, *fires, *silent))


@pytest.fixture
def chat(monkeypatch):
    """A model that says yes where the window has the described word; `failing` windows fail."""

    def answer(text):
        if any(word in text for word in model.failing):
            return Failure("http_503", may_pass=True)
        if "Reference: " in text:
            reference, candidate = (text.split(f"{name}: ")[1].split("\n")[0] for name in ("Reference", "Candidate"))
            return "5" if reference == candidate else "1"
        described = text.split("description:\n")[1].split("\n")[0]
        window = text.split("addressed to you):\n")[1].split("\n")[0]
        return (0.9, 0.1) if described and described in window else (0.2, 0.8)

    model = ScriptedChat(answer)
    model.failing = set()

    @contextmanager
    def opened(*_):
        yield model

    monkeypatch.setattr(judge_module, "chat_model", opened)
    monkeypatch.setattr(judge_module, "open_exemplars", lambda _: FakeStore())
    return model


def config(tmp_path, **settings):
    ours = [Description(1, n, word, "llm:x", {"old": 0.5}) for n, word in enumerate(WORDS)]
    ours.append(Description(1, 0, "rain", "other"))
    path = tmp_path / "descriptions.jsonl"
    path.write_text(description_lines(ours))
    usual = {"descriptions": (str(path),), "output": str(tmp_path / "out"), "windows": 3, "latents_per_shard": 1}
    return JudgeDescriptionsConfig(**usual | settings)


def run(config):
    seen = []
    summary = judge_descriptions(config, lambda *now: seen.append(now[:2]))
    return summary, seen


def scores(tmp_path):
    return json.loads((tmp_path / "out/scores.json").read_text())


def test_descriptions_are_scored_beside_controls_and_their_judgements_go_to_delphi(tmp_path, chat):
    summary, seen = run(config(tmp_path))
    found = scores(tmp_path)
    assert set(found) == {"llm:x", "other", "shuffled", "empty"}
    for kind in ("detection", "fuzz"):
        assert found["llm:x"][f"{kind}/balanced_accuracy"]["value"] == 1
        assert found["shuffled"][f"{kind}/balanced_accuracy"]["value"] == 0.5
        assert found["empty"][f"{kind}/recall"]["value"] == 0
    assert "llm:x" in summary.table and summary.failures == {}
    # 3 windows in which it fires and 3 in which it does not, twice, for 4 descriptions and 6 controls.
    assert len(chat.asked) == 2 * 6 * 10 and seen == [(0, 10), (4, 10), (7, 10), (10, 10)]
    first = read_descriptions(str(tmp_path / "out"))[0]
    assert first.scores["old"] == 0.5 and first.scores["detection/auc"] == 1
    lines = (tmp_path / "out/judgements.jsonl").read_text().splitlines()
    assert len(lines) == 2 * 4
    convert_descriptions(
        ConvertDescriptionsConfig(
            source=str(tmp_path / "out"),
            source_format="descriptions",
            output=str(tmp_path / "delphi"),
            output_format="delphi",
            delphi_best_by="detection/auc",
        )
    )
    rows = json.loads((tmp_path / "delphi/scores/fuzz/layers.1_latent0.txt").read_text())
    assert len(rows) == 6 and {row["correct"] for row in rows} == {True}
    assert sorted({row["distance"] for row in rows})[0] == -1

    del chat.asked[:]
    run(config(tmp_path))
    assert not chat.asked


def test_a_rare_latent_is_judged_on_each_of_its_windows_once_and_on_as_many_others(tmp_path, chat):
    run(config(tmp_path, windows=10))
    assert len(chat.asked) == 2 * (5 + 5) * 10, "of its 6 firing exemplars two are one window"


def test_descriptions_that_could_not_be_told_from_controls_are_refused(tmp_path, chat):
    path = tmp_path / "of_a_control.jsonl"
    path.write_text(description_lines([Description(1, 0, "cat", "shuffled")]))
    with pytest.raises(UserError, match=r"have the source 'shuffled', which is the name of a control: rename it$"):
        run(config(tmp_path, descriptions=(str(path),), controls=()))
    assert not chat.asked and not (tmp_path / "out").exists()


def test_descriptions_of_another_coder_are_refused_and_those_of_nobody_knows_whom_are_not(tmp_path, chat, caplog):
    settings = config(tmp_path, methods=("detection",), controls=())
    write_coder_digest(Folder(str(tmp_path)), "two")
    with pytest.raises(UserError, match=r"are of latents of another coder than pocket:sae, which .* of its latents$"):
        run(settings)
    assert not chat.asked and not (tmp_path / "out").exists() and not caplog.records
    write_coder_digest(Folder(str(tmp_path)), "one")
    run(settings)
    assert coder_digest_of(str(tmp_path / "out")) == "one" and not caplog.records
    (tmp_path / "summary.json").write_text("[]")
    run(settings.model_copy(update={"output": str(tmp_path / "again")}))
    assert "are of pocket:sae: the descriptions name no coder" in caplog.text
    assert coder_digest_of(str(tmp_path / "again")) == ""


def test_a_latent_with_few_silent_windows_is_judged_on_as_few_of_its_own(tmp_path, chat, monkeypatch):
    read = FakeStore.read

    def lopsided(self, latent, split):
        found = read(self, latent, split)
        silent = [one for one in found.exemplars if not one.activations.any()][:latent]
        return replace(found, exemplars=(*(one for one in found.exemplars if one.activations.any()), *silent))

    monkeypatch.setattr(FakeStore, "read", lopsided)
    run(config(tmp_path, methods=("detection",), controls=()))
    assert len(chat.asked) == 2 * (0 + 1 + 2)
    always, rare = scores(tmp_path)["other"], scores(tmp_path)["llm:x"]
    assert always["detection/failure_rate"]["undefined"] == {"no_windows": 1}
    assert "value" not in always["detection/f1"] or always["detection/f1"]["value"] is None
    assert rare["detection/f1"]["n"] == rare["detection/precision"]["n"] == 2


def test_what_failed_is_counted_and_asked_again_and_the_end_is_the_same(tmp_path, chat):
    run(config(tmp_path, output=str(tmp_path / "whole")))
    chat.failing = {"2: the town", "2: the⟦ town⟧"}
    summary, _ = run(config(tmp_path, windows=4))
    assert summary.failures == {"http_503": 6}
    assert scores(tmp_path)["llm:x"]["detection/failure_rate"]["value"] == pytest.approx((0 + 0 + 1 / 8) / 3)
    chat.failing = set()
    del chat.asked[:]
    summary, seen = run(config(tmp_path, windows=4))
    assert summary.failures == {} and seen == [(7, 10), (10, 10)] and len(chat.asked) == 2 * 8 * 3
    run(config(tmp_path, windows=4, output=str(tmp_path / "again")))
    for name in ("descriptions.jsonl", "judgements.jsonl", "controls.jsonl", "scores.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_too_many_failures_and_an_endpoint_that_is_silent_fail_the_run(tmp_path, chat):
    chat.failing = {" cat"}
    with pytest.raises(RunFailed, match=r"\d+ of 120 calls gave no usable answer, more than the share of 0\.1"):
        run(config(tmp_path, max_failed_share=0.1))
    chat.failing = {"A window"}
    with pytest.raises(RunFailed, match="the endpoint answered nothing, mostly http_503"):
        run(config(tmp_path, output=str(tmp_path / "silent")))


def test_a_shard_that_is_done_again_asks_an_endpoint_only_what_it_did_not_answer(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(judge_module, "open_exemplars", lambda _: FakeStore())
    broken = ["2: the town"]

    def answer(text, _number):
        return Reply(503) if any(word in text for word in broken) else said("yes", sent=1000, answered=0)

    with chat_server(answer) as (url, requests):
        endpoint = {"url": url, "attempts": 1, "input_price": 1.0, "max_cost": 1.0}
        chat = {"kind": "endpoint", "endpoint": endpoint}
        settings = config(tmp_path, windows=4, methods=("detection",), chat=chat)
        first, _ = run(settings)
        failed = sum(first.failures.values())
        different = {json.dumps(body) for _, body in requests}
        assert failed and len(requests) == len(different)
        broken.clear()
        before = len(requests)
        summary, _ = run(settings)
        again = {json.dumps(body) for _, body in requests[before:]}
    assert len(requests) - before == len(again) == first.failures["http_503"] and again < different
    assert summary.failures == {} and summary.cost == pytest.approx(0.001 * len(different))


@pytest.mark.usefixtures("chat")
def test_descriptions_are_compared_with_labels(tmp_path):
    labels = tmp_path / "labels.jsonl"
    label = [
        Description(1, 0, "dog", "lexicon"),
        Description(1, 0, "cat", "lexicon"),
        Description(1, 1, "x", "lexicon"),
    ]
    labels.write_text(description_lines(label))
    run(config(tmp_path, methods=("judge", "embedding"), labels=(str(labels),), controls=("empty",)))
    found = scores(tmp_path)
    assert found["llm:x"]["judge"]["value"] == 0.5 and found["llm:x"]["judge"]["undefined"] == {"no_label": 1}
    best = {one.latent: one.scores for one in read_descriptions(str(tmp_path / "out")) if one.source == "llm:x"}
    assert best[0]["judge"] == 1 and best[1]["judge"] == 0 and best[2]["judge"] is None
    assert best[0]["embedding"] == pytest.approx(1, abs=1e-5) and best[1]["embedding"] < 1 - 1e-4
    assert found["empty"]["embedding"]["undefined"] == {"text_without_tokens": 2, "no_label": 1}
    with pytest.raises(UserError, match="name none of the 3 latents"):
        labels.write_text(description_lines([Description(1, 77, "x", "lexicon")]))
        run(config(tmp_path, methods=("judge",), labels=(str(labels),), output=str(tmp_path / "none")))
    with pytest.raises(ValueError, match="method judge needs labels"):
        config(tmp_path, methods=("judge",))
