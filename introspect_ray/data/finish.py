"""From finished shards to a finished dataset: counts, selection, accounts, and the manifest last.

Shards pass one at a time; of a record, only its id and the few values that accounts and selection need are kept.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping

import pyarrow as pa
import pyarrow.compute as pc

from introspect_ray.config import resolved
from introspect_ray.data.dataset import read_shard
from introspect_ray.data.manifest import REJECTED_NAME, SCHEMA_VERSION, SELECTION_NAME, Manifest, write_manifest
from introspect_ray.data.prepare import Prepared
from introspect_ray.data.shards import ATTEMPTS_SUFFIX, ShardInfo, ShardOrder, parquet_bytes
from introspect_ray.data.storage import TEMPORARY, Folder
from introspect_ray.data.writer import ERRORS
from introspect_ray.errors import RunFailed
from introspect_ray.tasks.base import OK


def finish(prepared: Prepared, shards: Mapping[int, ShardInfo]) -> Manifest:
    """Write everything beside the shards. Raises RunFailed if too many records failed; the shards stay."""
    config, folder, task = prepared.config, prepared.folder, prepared.task
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    first_error = ""
    tables = []
    for order in prepared.orders:
        table, error = _account(prepared, order, shards[order.index], counts)
        tables.append(table)
        first_error = first_error or error
    _check_failures(prepared, counts, first_error)
    usable = pa.concat_tables(tables).unify_dictionaries()
    ids = usable["record_id"]
    assert pc.count_distinct(ids).as_py() == len(ids), "record ids are unique over the whole dataset"
    usable = usable.filter(pc.equal(usable["status"], OK))
    selection = task.select(usable, config)
    rejected = "".join(json.dumps({"row": row, "reason": reason}) + "\n" for row, reason in prepared.rejected)
    folder.write(REJECTED_NAME, rejected.encode())
    chosen = None if selection is None else pa.array(sorted(selection), pa.string())
    if chosen is not None:
        folder.write(SELECTION_NAME, parquet_bytes(pa.table({"record_id": chosen})))
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        task=task.name,
        config=resolved(config),
        run_key=prepared.run_key,
        target=prepared.target,
        source=prepared.account,
        num_records=len(ids),
        counts={split: dict(sorted(found.items())) for split, found in sorted(counts.items())},
        selected=_selected(usable, chosen),
        has_selection=chosen is not None,
        shards=tuple(shards[order.index] for order in prepared.orders),
    )
    write_manifest(folder, manifest)
    _sweep(folder)
    return manifest


def _account(
    prepared: Prepared, order: ShardOrder, shard: ShardInfo, counts: dict[str, Counter[str]]
) -> tuple[pa.Table, str]:
    """What is kept of one shard, and the detail of its first error; adds to `counts` (split -> status -> records).

    Asserts that every work item left at least one record, and that there is no other.
    """
    kept = ["record_id", "split", "status", *prepared.task.selected_by]
    records = read_shard(prepared.folder, shard, [*kept, "item_id", "detail"])
    planned = pa.array([item["item_id"] for item in prepared.items(order)], pa.string())
    found = pc.unique(records["item_id"])
    assert len(found) == len(planned) and pc.all(pc.is_in(found, planned)).as_py(), (
        "every planned item has a record, and there is no other"
    )
    for group in records.group_by(["split", "status"]).aggregate([([], "count_all")]).to_pylist():
        counts[group["split"]][group["status"]] += group["count_all"]
    errors = records.filter(pc.is_in(records["status"], pa.array(ERRORS)))
    for name in kept[1:]:
        if pa.types.is_string(records.schema.field(name).type):
            place = records.schema.get_field_index(name)
            records = records.set_column(place, name, records[name].dictionary_encode())
    return records.select(kept), errors["detail"][0].as_py() if errors.num_rows else ""


def _check_failures(prepared: Prepared, counts: Mapping[str, Mapping[str, int]], first_error: str) -> None:
    config = prepared.config
    reasons = Counter[str]()
    for found in counts.values():
        reasons.update(found)
    # An item that ended so has no other record.
    errors, items = sum(reasons[status] for status in ERRORS), len(prepared.plan.items)
    if errors > config.max_error_share * items:
        raise RunFailed(
            f"{errors} of {items} work items ended with an error, more than max_error_share {config.max_error_share:g}"
            f" allows; the first is: {first_error}; a run with a larger max_error_share keeps what is done, and one"
            f" without the folder {prepared.folder.url}/shards does it again"
        )
    total = reasons.total()
    failed = total - reasons.pop(OK, 0)
    if failed > config.max_failed_share * total:
        most = ", ".join(f"{reason}: {count}" for reason, count in reasons.most_common(3))
        raise RunFailed(
            f"{failed} of {total} records have no truth ({most}), more than max_failed_share"
            f" {config.max_failed_share:g} allows; a run with a larger max_failed_share keeps what is done"
        )


def _selected(usable: pa.Table, chosen: pa.Array | None) -> dict[str, int]:
    """Split -> records to train and score on; asserts that only ok records are selected, each once."""
    if chosen is not None:
        usable = usable.filter(pc.is_in(usable["record_id"], chosen))
        assert pc.count_distinct(chosen).as_py() == len(chosen), "a record is selected at most once"
        assert usable.num_rows == len(chosen), "only ok records are selected"
    return dict(sorted((group["values"], group["counts"]) for group in pc.value_counts(usable["split"]).to_pylist()))


def _sweep(folder: Folder) -> None:
    """Remove what interrupted writes left behind."""
    for part in ("", "plan/", "shards/"):
        inside = Folder(f"{folder.url.rstrip('/')}/{part}")
        for name in inside.names():
            if name.startswith(TEMPORARY) or name.endswith(ATTEMPTS_SUFFIX):
                inside.remove(name)
