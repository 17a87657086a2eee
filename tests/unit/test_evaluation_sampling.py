"""Which test records are scored when not all are."""

from collections import Counter

from introspect_ray.evaluation.sampling import spread


def records(sizes: dict[str, int]) -> list[dict[str, str]]:
    return [
        {"record_id": f"{group}{number}", "group": group} for group, size in sizes.items() for number in range(size)
    ]


def test_every_group_gives_equally_many_until_it_has_no_more():
    rows = records({"big": 50, "small": 2, "middle": 9})
    chosen = spread(rows, 20)
    assert Counter(row["group"] for row in chosen) == {"big": 9, "small": 2, "middle": 9}
    assert [row for row in rows if row in chosen] == chosen, "in their order"


def test_the_draw_is_stable_and_grows_with_the_limit():
    rows = records({"a": 30, "b": 30})
    few, many = spread(rows, 10), spread(rows, 30)
    assert spread(list(reversed(rows)), 10) == list(reversed(few))
    assert {row["record_id"] for row in few} < {row["record_id"] for row in many}
    assert [row["record_id"] for row in few if row["group"] == "a"] != [f"a{number}" for number in range(5)]


def test_no_limit_is_everything():
    rows = records({"a": 3})
    assert spread(rows, None) == rows == spread(rows, 3)
