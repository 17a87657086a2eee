"""From finished shards to a finished dataset: counts, selection, accounts, and the manifest last."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping

import pyarrow as pa

from introspect_ray.config import resolved
from introspect_ray.data.dataset import read_shard
from introspect_ray.data.manifest import REJECTED_NAME, SCHEMA_VERSION, SELECTION_NAME, Manifest, write_manifest
from introspect_ray.data.prepare import Prepared
from introspect_ray.data.shards import ATTEMPTS_SUFFIX, ShardInfo, parquet_bytes, vector_columns
from introspect_ray.data.storage import TEMPORARY, Folder
from introspect_ray.errors import RunFailed
from introspect_ray.tasks.base import OK


def finish(prepared: Prepared, shards: Mapping[int, ShardInfo]) -> Manifest:
    """Write everything beside the shards. Raises RunFailed if too many records failed; the shards stay."""
    config, folder, task = prepared.config, prepared.folder, prepared.task
    listed = tuple(shards[order.index] for order in prepared.orders)
    schema = task.schema(prepared.target.width, config)
    vectors = set(vector_columns(schema))
    scalars = [name for name in schema.names if name not in vectors]
    records = pa.concat_tables([read_shard(folder, shard, scalars) for shard in listed])
    _check_items(prepared, records)
    counts = _counts(records)
    _check_failed_share(counts, config.max_failed_share)
    selection = task.select(records, config)
    rejected = "".join(json.dumps({"row": row, "reason": reason}) + "\n" for row, reason in prepared.rejected)
    folder.write(REJECTED_NAME, rejected.encode())
    if selection is not None:
        ids = pa.table({"record_id": pa.array(sorted(selection), pa.string())})
        folder.write(SELECTION_NAME, parquet_bytes(ids))
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        task=task.name,
        config=resolved(config),
        run_key=prepared.run_key,
        target=prepared.target,
        source=prepared.account,
        num_records=records.num_rows,
        counts=counts,
        selected=_selected(records, selection),
        has_selection=selection is not None,
        shards=listed,
    )
    write_manifest(folder, manifest)
    _sweep(folder)
    return manifest


def _check_items(prepared: Prepared, records: pa.Table) -> None:
    """Asserts that every work item left at least one record, and that no record is there twice."""
    planned = {item["item_id"] for item in prepared.plan.items}
    assert set(records["item_id"].to_pylist()) == planned, "every planned item has a record, and there is no other"
    ids = records["record_id"].to_pylist()
    assert len(set(ids)) == len(ids), "record ids are unique over the whole dataset"


def _counts(records: pa.Table) -> dict[str, dict[str, int]]:
    """Split -> status -> records."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for split, status in zip(records["split"].to_pylist(), records["status"].to_pylist(), strict=True):
        counts[split][status] += 1
    return {split: dict(sorted(found.items())) for split, found in sorted(counts.items())}


def _check_failed_share(counts: Mapping[str, Mapping[str, int]], allowed: float) -> None:
    reasons = Counter[str]()
    for found in counts.values():
        reasons.update(found)
    total = reasons.total()
    failed = total - reasons.pop(OK, 0)
    if failed > allowed * total:
        most = ", ".join(f"{reason}: {count}" for reason, count in reasons.most_common(3))
        raise RunFailed(
            f"{failed} of {total} records have no truth ({most}), more than max_failed_share {allowed:g} allows;"
            " a run with a larger max_failed_share keeps what is done"
        )


def _selected(records: pa.Table, selection: list[str] | None) -> dict[str, int]:
    """Split -> records to train and score on; asserts that only ok records are selected, each once."""
    usable = {
        record_id: split
        for record_id, split, status in zip(
            *(records[name].to_pylist() for name in ("record_id", "split", "status")), strict=True
        )
        if status == OK
    }
    chosen = list(usable) if selection is None else selection
    assert len(set(chosen)) == len(chosen), "a record is selected at most once"
    assert usable.keys() >= set(chosen), "only ok records are selected"
    return dict(sorted(Counter(usable[record_id] for record_id in chosen).items()))


def _sweep(folder: Folder) -> None:
    """Remove what interrupted writes left behind."""
    for part in ("", "plan/", "shards/"):
        inside = Folder(f"{folder.url.rstrip('/')}/{part}")
        for name in inside.names():
            if name.startswith(TEMPORARY) or name.endswith(ATTEMPTS_SUFFIX):
                inside.remove(name)
