"""Simulators end to end on the local CPU: exemplars, two workers train one, scores go on after an interruption."""

import json
from pathlib import Path

import pytest

from introspect_ray.config import CollectConfig, ScoreDescriptionsConfig, TrainSimulatorConfig
from introspect_ray.data.cluster import connect
from introspect_ray.data.collect import collect_exemplars
from introspect_ray.data.description_files import lexicon_descriptions, write_descriptions
from introspect_ray.data.storage import Folder
from introspect_ray.errors import UserError
from introspect_ray.features.descriptions import Description
from introspect_ray.training.score_descriptions import score_descriptions
from introspect_ray.training.train_simulator import train_simulator

pytestmark = pytest.mark.timeout(600)
NUM_LATENTS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Exemplars of the pocket SAE on few texts, descriptions of some latents, and a simulator of two workers."""
    made = tmp_path_factory.mktemp("simulators")
    texts = "\n".join(
        json.dumps({"text": text})
        for text in (f"{start} {word} {end}" for start in _STARTS for word in _WORDS for end in ("here .", "there ."))
    )
    (made / "texts.jsonl").write_text(texts)
    with connect():
        collect_exemplars(
            CollectConfig.model_validate(
                {
                    "output": str(made / "exemplars"),
                    "source": {"path": str(made / "texts.jsonl")},
                    "limits": {"random": 8, "pool": 16, "silent": 2, "top": 4},
                }
            ),
            lambda *_: None,
        )
        labels = [one for one in lexicon_descriptions("pocket:sae") if "label_f1" in one.scores]
        live = _live(made)
        own = [one for one in labels if one.latent in live][:NUM_LATENTS]
        other = Description(own[0].layer, own[0].latent, "another candidate", "llm:made-up")
        write_descriptions(Folder(str(made / "descriptions")), [*own, other])
        summary = train_simulator(_train_config(made), lambda *_: None)
        assert summary.line.startswith(f"wrote {made / 'simulator'}: simulator after 4 steps on {NUM_LATENTS} latents")
        yield made


_STARTS = ("The farm has a", "She packed the", "In the barn is one", "Nobody sold that")
_WORDS = ("horse", "coat", "barn", "apple", "guitar", "train", "river", "doctor")


def _live(made: Path) -> set[int]:
    from introspect_ray.features.exemplar_store import open_exemplars

    return {stats.latent for stats in open_exemplars(str(made / "exemplars")).latents()}


def _train_config(made: Path, **changes: object) -> TrainSimulatorConfig:
    return TrainSimulatorConfig.model_validate(
        {
            "exemplars": str(made / "exemplars"),
            "descriptions": [str(made / "descriptions")],
            "output": str(made / "simulator"),
            "held_out_share": 0,
            "optimization": {"steps": 4, "batch_size": 8},
            "trainer": {"num_workers": 2, "cpus_per_worker": 0.5, "checkpoint_every": 2, "log_every": 1},
            "logging": {"tensorboard": False},
            **changes,
        }
    )


def _score_config(made: Path, **changes: object) -> ScoreDescriptionsConfig:
    return ScoreDescriptionsConfig.model_validate(
        {
            "exemplars": str(made / "exemplars"),
            "descriptions": [str(made / "descriptions")],
            "output": str(made / "scores"),
            "simulator": {"model": {"path": str(made / "simulator"), "device": "cpu"}},
            "latents_per_shard": 2,
            "bootstrap_samples": 100,
            **changes,
        }
    )


def test_a_finished_simulator_is_not_trained_again(folder):
    again = train_simulator(_train_config(folder), lambda *_: None)
    assert again.was_complete and again.results["step"] == 4
    with pytest.raises(UserError, match=r"belongs to another config \(seed is 0 there, 1 here\)"):
        train_simulator(_train_config(folder, seed=1), lambda *_: None)


def test_scores_go_on_where_they_stopped_and_come_out_the_same(folder):
    seen = []
    first = score_descriptions(_score_config(folder), lambda *step: seen.append(step[:2]))
    total = NUM_LATENTS + 1 + 2 * NUM_LATENTS
    assert seen[0] == (0, total) and seen[-1] == (total, total)
    output = folder / "scores"
    files = ("descriptions.jsonl", "best.jsonl", "controls.jsonl", "scores.json", "report.html")
    before = {name: (output / name).read_bytes() for name in files}
    scores = json.loads(before["scores.json"])
    assert set(scores) == {"best", "lexicon", "llm:made-up", "shuffled", "empty"}
    assert "correlation" in first.table
    kept = (output / "shards" / "shard-00000.json").stat().st_mtime_ns
    (output / "shards" / "shard-00001.json").write_text("torn")
    (output / "scores.json").unlink()
    seen.clear()
    score_descriptions(_score_config(folder, actors={"initial_size": 2, "max_size": 2}), lambda *s: seen.append(s[:2]))
    assert 0 < seen[0][0] < total
    assert (output / "shards" / "shard-00000.json").stat().st_mtime_ns == kept
    assert {name: (output / name).read_bytes() for name in files} == before
    best = [json.loads(line) for line in before["best.jsonl"].splitlines()]
    assert len(best) == NUM_LATENTS, "one of two candidates, and all that have no rival"
    with pytest.raises(UserError, match=r"no description is of a held_out latent at held_out_share 0$"):
        score_descriptions(_score_config(folder, only="held_out"), lambda *_: None)
    with pytest.raises(UserError, match=r"belongs to another config \(held_out is 'test' there, 'validation' here\)"):
        score_descriptions(_score_config(folder, held_out="validation"), lambda *_: None)
