"""Describing latents without Ray: an endpoint that fails in every way, stops in between, a cap; nothing is lost."""

import json
import re
from collections import Counter
from types import SimpleNamespace

import pytest
from chat_server import Reply, chat_server, said
from exemplar_helpers import exemplar

import introspect_ray.training.describe as describe_module
from introspect_ray.config import ChatConfig, DescribeConfig, EndpointConfig
from introspect_ray.data.description_files import coder_digest_of, lexicon_descriptions, read_descriptions
from introspect_ray.data.identity import folder_digest
from introspect_ray.errors import RunFailed, UserError
from introspect_ray.features.card import coder_folder
from introspect_ray.features.exemplars import LatentExemplars
from introspect_ray.training.describe import describe_latents

NUM_LATENTS = 7


class FakeStore:
    """Latent n fires on the token ` word-n`; the last one in no window."""

    meta = SimpleNamespace(run_key="exemplars of a test", coder_digest="one")

    def latents(self):
        return [SimpleNamespace(layer=2, latent=10 * n) for n in range(NUM_LATENTS)]

    def read(self, latent, split):
        assert split == "train"
        fires = {1: 4.0} if latent < 10 * (NUM_LATENTS - 1) else {}
        return LatentExemplars(2, latent, 0.1, 4.0, (exemplar(["The", f" word-{latent}"], fires),))


@pytest.fixture(autouse=True)
def _fakes(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(describe_module, "open_exemplars", lambda _: FakeStore())


def latent_in(text):
    return int(re.search(r"word-(\d+)", text)[1])


def config(url, tmp_path, **settings):
    endpoint = {"url": url, "attempts": 1, "first_wait_s": 0.0, "concurrency": 2, **settings.pop("endpoint", {})}
    chat = {"temperature": 1.0, "max_tokens": 10, **settings.pop("chat", {})}
    return DescribeConfig(
        method="chat",
        output=str(tmp_path / "out"),
        chat=ChatConfig(kind="endpoint", endpoint=EndpointConfig(**endpoint), **chat),
        **{"latents_per_shard": 3, "max_failed_share": 0.5, **settings},
    )


def run(config):
    seen = []
    summary = describe_latents(config, lambda *now: seen.append(now))
    return summary, seen


def outcome(tmp_path):
    """Texts by latent, and reasons of failed answers by latent."""
    texts, reasons = {}, {}
    for one in read_descriptions(str(tmp_path / "out")):
        texts.setdefault(one.latent, []).append(one.text)
    for line in (tmp_path / "out/failed.jsonl").read_text().splitlines():
        row = json.loads(line)
        reasons.setdefault(row["latent"], []).append(row["reason"])
    return texts, reasons


def test_every_latent_ends_with_candidates_or_reasons_and_the_same_command_asks_only_what_may_pass(tmp_path):
    broken = {10: Reply(503), 20: Reply(400), 30: said("..."), 40: said("same")}

    def answer(text, _number):
        latent = latent_in(text)
        if latent in broken:
            return broken[latent]
        return said(f"about {latent}, {asked[latent]}") if not asked.update([latent]) else None

    asked = Counter()
    with chat_server(answer) as (url, requests):
        settings = config(url, tmp_path, num_candidates=2, max_failed_share=0.9)
        summary, seen = run(settings)
        texts, reasons = outcome(tmp_path)
        assert {latent: len(found) for latent, found in texts.items()} == {0: 2, 40: 1, 50: 2}
        assert texts[40] == ["same"] and len(set(texts[0])) == 2
        assert reasons == {
            10: ["http_503"] * 2,
            20: ["http_400"] * 2,
            30: ["no_description_in_answer"] * 2,
            60: ["fires_in_no_window"],
        }
        assert (summary.num_latents, summary.num_described, summary.num_descriptions) == (7, 3, 5)
        assert summary.failures == {
            "http_503": 2,
            "http_400": 2,
            "no_description_in_answer": 2,
            "fires_in_no_window": 1,
        }
        assert [now[:2] for now in seen] == [(2, 7), (5, 7), (6, 7)]
        assert read_descriptions(str(tmp_path / "out"))[0].source == "llm:default"

        del broken[10], requests[:]
        summary, _ = run(settings)
        assert [latent_in(body["messages"][0]["content"]) for _, body in requests] == [10, 10]
        assert outcome(tmp_path)[0][10] and summary.num_described == 4
        del requests[:], broken[20], broken[30]
        assert "already complete" in run(settings)[0].line and not requests
        summary, _ = run(settings.model_copy(update={"retry_failed": True}))
        assert (summary.num_described, summary.failures, len(requests)) == (6, {"fires_in_no_window": 1}, 4)
    assert json.loads((tmp_path / "out/summary.json").read_text())["described"] == 6


def test_a_run_that_was_stopped_ends_like_one_that_was_not(tmp_path):
    class Stop(Exception):
        pass

    def stop_after_first(*_):
        raise Stop

    with chat_server(lambda text, _: said(f"about {latent_in(text)}")) as (url, requests):
        settings = config(url, tmp_path)
        with pytest.raises(Stop):
            describe_latents(settings, stop_after_first)
        assert not (tmp_path / "out/descriptions.jsonl").exists() and len(requests) == 3
        # A torn shard, and what is left of an interrupted write.
        (tmp_path / "out/shards/.tmp-1-shard-00001.jsonl").write_text("x")
        run(settings)
        assert len(requests) == 6
        stopped = (tmp_path / "out/descriptions.jsonl").read_bytes()
        shard = tmp_path / "out/shards/shard-00000.jsonl"
        shard.write_bytes(shard.read_bytes()[:-10])
        run(settings)
        assert len(requests) == 9
        run(settings.model_copy(update={"output": str(tmp_path / "whole")}))
    assert stopped == (tmp_path / "whole/descriptions.jsonl").read_bytes()
    assert stopped == (tmp_path / "out/descriptions.jsonl").read_bytes()


def test_an_answer_that_came_late_takes_its_own_place(tmp_path):
    late = [Reply(503)]

    def answer(_text, number):
        return late[0] if late and number == 1 else said(f"candidate {number}")

    with chat_server(answer) as (url, requests):
        settings = config(url, tmp_path, latents=(0,), num_candidates=2)
        run(settings)
        late.clear()
        run(settings)
        assert [body["seed"] for _, body in requests] == [0, 1, 0]
    # The first sample came with the third call, and stands first as it would have otherwise.
    assert outcome(tmp_path)[0] == {0: ["candidate 3", "candidate 2"]}


def test_a_cost_cap_stops_the_run_and_a_higher_one_goes_on_with_what_was_spent(tmp_path):
    with chat_server(lambda text, _: said(f"about {latent_in(text)}", sent=1000, answered=0)) as (url, requests):
        prices = {"input_price": 1.0, "concurrency": 1}
        settings = config(url, tmp_path, endpoint={**prices, "max_cost": 0.003})
        with pytest.raises(RunFailed, match=r"max_cost was reached, 0\.00\d+ spent: \d of 7 latents"):
            run(settings)
        first = len(requests)
        assert 0 < first <= 3
        texts, reasons = outcome(tmp_path)
        assert len(texts) == first and ["cost_cap"] in reasons.values()
        cost = json.loads((tmp_path / "out/summary.json").read_text())["cost"]
        assert cost == pytest.approx(first * 0.001) and cost <= 0.003

        summary, _ = run(config(url, tmp_path, endpoint={**prices, "max_cost": 1.0}))
        assert len(requests) == 6 and summary.num_described == 6
        assert summary.cost == pytest.approx(0.006)


def test_answers_that_were_paid_for_are_not_asked_for_again_after_a_stop_between_them(tmp_path, monkeypatch):
    class Stop(BaseException):
        pass

    stop_at = [4]

    def answer(text, number):
        return said(f"about {latent_in(text)}", sent=1000, answered=0) if number != stop_at[0] else None

    def stopped(*_):
        raise Stop

    with chat_server(answer) as (url, requests):
        prices = {"input_price": 1.0, "concurrency": 1, "max_cost": 1.0}
        settings = config(url, tmp_path, latents_per_shard=9, endpoint=prices)
        with monkeypatch.context() as patch:
            patch.setattr(describe_module, "write_rows", stopped)
            with pytest.raises(Stop):
                run(settings)
        assert len(requests) == 6 and not (tmp_path / "out/shards").exists()
        summary, _ = run(settings)
        # The fourth call got no answer, may have been charged, and is made again; nothing else is.
        asked = Counter(latent_in(body["messages"][0]["content"]) for _, body in requests)
        assert asked == {0: 1, 10: 1, 20: 1, 30: 2, 40: 1, 50: 1}
        assert summary.num_described == 6 and summary.cost > 0.006
        assert len(list((tmp_path / "out/calls").iterdir())) == 1
        again, _ = run(settings)
    assert again.asked == 0 and again.cost == summary.cost


def test_an_endpoint_that_answers_nothing_ends_the_run_and_the_same_command_goes_on(tmp_path):
    replies = [Reply(401, b"no such key")]
    with chat_server(lambda text, _: replies[0] if replies else said(f"about {latent_in(text)}")) as (url, requests):
        settings = config(url, tmp_path)
        with pytest.raises(RunFailed, match=r"answered nothing about 3 latents, mostly http_401 \(no such key\)"):
            run(settings)
        assert len(requests) <= 2
        replies.clear()
        summary, _ = run(settings)
    assert summary.num_described == 6


def test_a_dead_endpoint_is_noticed_beside_latents_that_fire_nowhere(tmp_path):
    with chat_server(lambda *_: Reply(503, b"closed")) as (url, _):
        settings = config(url, tmp_path, latents=(50, 60), latents_per_shard=2)
        with pytest.raises(RunFailed, match=r"answered nothing about 2 latents, mostly http_503 \(closed\)"):
            run(settings)


def test_too_many_latents_without_description_fail_the_run_after_all_is_written(tmp_path):
    with (
        chat_server(lambda text, _: said("fine") if latent_in(text) == 0 else Reply(400)) as (url, _),
        pytest.raises(RunFailed, match=r"6 of 7 latents have no description, more than the share of 0\.5"),
    ):
        run(config(url, tmp_path))
    assert outcome(tmp_path)[0] == {0: ["fine"]}


def test_the_lexicon_is_looked_up(tmp_path):
    labels = lexicon_descriptions("pocket:sae")
    last = labels[-1].latent
    summary, _ = run(DescribeConfig(output=str(tmp_path / "out"), latents=(last, 0)))
    assert coder_digest_of(str(tmp_path / "out")) == folder_digest(coder_folder("pocket:sae"))
    assert summary.num_latents == 2
    assert read_descriptions(str(tmp_path / "out")) == [one for one in labels if one.latent in (0, last)]


def test_bad_input_is_refused_before_anything_is_written(tmp_path):
    def refused(**settings):
        with pytest.raises(UserError) as error:
            run(DescribeConfig(output=str(tmp_path / "out"), **settings))
        assert not (tmp_path / "out").exists()
        return str(error.value)

    assert "has nothing about latent 999999" in refused(latents=(1, 999_999))
    assert "api_key_variable is NO_SUCH_KEY" in refused(
        method="chat", chat=ChatConfig(kind="endpoint", endpoint=EndpointConfig(api_key_variable="NO_SUCH_KEY"))
    )
    assert "does not exist" in refused(
        method="chat", chat=ChatConfig.model_validate({"local": {"model": {"path": "/no"}}})
    )
    assert "explainer" in refused(method="explainer", explainer=str(tmp_path / "nothing"))


def test_another_config_does_not_take_over_the_folder_but_patience_and_price_may_change(tmp_path):
    with chat_server(lambda text, _: said(f"about {latent_in(text)}")) as (url, requests):
        run(config(url, tmp_path))
        with pytest.raises(UserError, match=r"prompt\.max_words is 20 there, 5 here"):
            run(config(url, tmp_path, prompt={"max_words": 5}))
        patient = {"timeout_s": 7.0, "concurrency": 1, "input_price": 1.0, "max_cost": 9.0}
        assert run(config(url, tmp_path, endpoint=patient))[0].asked == 0
        assert len(requests) == 6
