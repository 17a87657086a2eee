"""What a run says of itself at its end."""

from types import SimpleNamespace

from fake_task import WIDTH, FakeTask, fake_config, make_dataset

from introspect_ray.data.generate import Summary
from introspect_ray.data.inspect import inspect_dataset


def test_a_target_that_took_a_slower_way_is_named(tmp_path):
    reasons = ["", "hooks", "hooks", "", "hooks", ""]
    waiting = iter(reasons)
    slow = SimpleNamespace(width=WIDTH, take_slow_reasons=lambda: next(waiting))
    config = fake_config(tmp_path, [f"question {number}" for number in range(23)])
    manifest = make_dataset(config, target=slow)
    assert [shard.slow_because for shard in manifest.shards] == reasons
    assert Summary(config.output, manifest, 6).line.endswith("; slow in 3 shards: hooks")
    assert make_dataset(config) == manifest, "what a shard says of itself is read from its file"
    notes = [note.message for note in inspect_dataset(config.output, 0, FakeTask()).notes]
    assert "slow in 3 of 6 shards: hooks" in notes
    none = Summary(config.output, manifest.model_copy(update={"shards": manifest.shards[:1]}), 6)
    assert "; slow in" not in none.line
