"""Real inputs go through on both pocket targets: every row is used or has a reason, every item is a record.

The first rows only, so that it takes seconds; nothing here depends on which rows they are.
"""

from pathlib import Path

import pytest
from fake_task import make_dataset

from introspect_ray.config import GenerateConfig
from introspect_ray.data.dataset import open_dataset
from introspect_ray.data.inspect import inspect_dataset
from introspect_ray.interventions.target import Target
from introspect_ray.tasks.registry import get_task

REAL_DATA = Path(__file__).parents[3] / "shared" / "data"
ROWS = 60


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="the real inputs are not here")
@pytest.mark.parametrize("target", ["pocket:target_a", "pocket:target_b"])
@pytest.mark.parametrize(
    ("name", "task", "reasons"),
    [
        ("known_facts.json", "activation_patching", {"answer_has_no_text"}),
        ("mmlu_sample.jsonl", "input_ablation", {"answer_names_no_option", "prompt_too_long"}),
    ],
)
def test_real_rows_go_through(name, task, reasons, target, tmp_path):
    config = GenerateConfig.model_validate(
        {
            "task": task,
            "target": {"path": target, "device": "cpu"},
            "source": {"path": str(REAL_DATA / name), "limit": ROWS},
            "output": str(tmp_path / "out"),
            "activation_patching": {"pairs_per_subject": 1},
            "items_per_shard": 32,
            "max_failed_share": 1,
        }
    )
    manifest = make_dataset(config, get_task(task), Target.load(config.target))
    assert manifest.source.rows == ROWS == manifest.source.used + sum(manifest.source.rejected.values())
    assert set(manifest.source.rejected) <= {"duplicate_row", "no_partner"}
    records = open_dataset(config.output).records(None, ["status", "item_id"], selected=False)
    assert {record["status"] for record in records} <= {"ok", *reasons}
    assert len({record["item_id"] for record in records}) >= ROWS // 3
    if task == "activation_patching":
        assert any(record["status"] == "ok" for record in records)
    assert inspect_dataset(config.output, 1).problems == []
