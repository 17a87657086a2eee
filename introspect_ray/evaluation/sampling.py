"""Which records are scored where not all are."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice, zip_longest

from introspect_ray.tasks.base import Record, stable_id


def spread(records: Sequence[Record], limit: int | None) -> list[Record]:
    """At most `limit` records, in their order: the same number of every group where it has so many, by stable draw.

    Groups are the independent units: a few records of each say more than all records of a few.
    """
    if limit is None or len(records) <= limit:
        return list(records)
    groups: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda record: stable_id("spread", record["record_id"])):
        groups.setdefault(record["group"], []).append(record)
    turns = zip_longest(*(groups[name] for name in sorted(groups, key=stable_id)))
    drawn = (record["record_id"] for turn in turns for record in turn if record is not None)
    chosen = set(islice(drawn, limit))
    return [record for record in records if record["record_id"] in chosen]
