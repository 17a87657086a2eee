"""Metrics against their definitions, on lopsided cases computed by hand."""

from __future__ import annotations

import math
import unicodedata

import pytest
from evaluation_helpers import row, rows

from introspect_ray.evaluation.metrics import (
    METRICS,
    content_match,
    description_match,
    exact_match,
    has_changed_f1,
    normalize,
    paper_compat_exact_match,
    paper_compat_has_changed_f1,
    parse_rate,
)

CHANGED, SAME = (True, "Greek"), (False, "French")


def test_exact_match_needs_verdict_and_content() -> None:
    scored = rows(
        (CHANGED, (True, "Greek"), 3),  # right
        (CHANGED, (True, "Dutch"), 4),  # verdict right, content wrong
        (CHANGED, (False, "Greek"), 2),  # content right, verdict wrong
        (SAME, None, 1),  # unparsable
    )
    assert exact_match(scored) == pytest.approx(3 / 10)
    assert content_match(scored) == pytest.approx(5 / 10)
    assert parse_rate(scored) == pytest.approx(9 / 10)


def test_has_changed_f1_by_hand() -> None:
    scored = rows(
        (CHANGED, (True, "x"), 6), (CHANGED, (False, "x"), 2), (SAME, (True, "x"), 1), (SAME, (False, "x"), 1)
    )
    changed = 2 * 6 / (2 * 6 + 1 + 2)
    same = 2 * 1 / (2 * 1 + 2 + 1)
    assert has_changed_f1(scored) == pytest.approx((changed + same) / 2)


def test_has_changed_f1_is_not_fooled_by_transposed_cells() -> None:
    """With unparsable rows false negatives and false positives are no mirror images, so a transposed table shows."""
    scored = rows((CHANGED, (True, "x"), 5), (CHANGED, None, 5), (SAME, (True, "x"), 2), (SAME, (False, "x"), 1))
    # changed: TP 5, FP 2, FN 5 (the unparsable ones); same: TP 1, FP 0, FN 2
    assert has_changed_f1(scored) == pytest.approx((10 / (10 + 2 + 5) + 2 / (2 + 0 + 2)) / 2)


def test_unparsable_answers_cost_f1_but_not_in_the_papers_version() -> None:
    scored = rows((CHANGED, (True, "x"), 1), (CHANGED, None, 9), (SAME, (False, "x"), 10))
    assert has_changed_f1(scored) == pytest.approx((2 / (2 + 9) + 1) / 2)
    assert paper_compat_has_changed_f1(scored) == 1.0


def test_verdict_missing_from_a_parsed_answer_counts_as_unparsable() -> None:
    with_none = rows((CHANGED, (True, "x"), 3), (CHANGED, (None, "x"), 2), (SAME, (False, "x"), 1))
    unparsed = rows((CHANGED, (True, "x"), 3), (CHANGED, None, 2), (SAME, (False, "x"), 1))
    assert has_changed_f1(with_none) == has_changed_f1(unparsed) < 1


def test_absent_class_is_left_out_of_the_mean() -> None:
    assert has_changed_f1(rows((CHANGED, (True, "x"), 3), (CHANGED, None, 1))) == pytest.approx(6 / 7)
    # predicted once, so the class is there, with F1 zero
    assert has_changed_f1(rows((CHANGED, (True, "x"), 3), (CHANGED, (False, "x"), 1))) == pytest.approx(6 / 7 / 2)


def test_all_unparsable_is_zero_and_undefined_for_valid_rows() -> None:
    scored = rows((CHANGED, None, 3), (SAME, None, 2))
    assert has_changed_f1(scored) == 0
    assert math.isnan(paper_compat_has_changed_f1(scored))
    assert exact_match(scored) == 0


def test_always_changed_on_a_lopsided_split() -> None:
    scored = rows((CHANGED, (True, "Greek"), 9), (SAME, (True, "Greek"), 1))
    assert exact_match(scored) == pytest.approx(0.9)
    assert has_changed_f1(scored) == pytest.approx(18 / 19 / 2)


def test_description_match_takes_any_accepted_one() -> None:
    scored = [
        row((None, "cities"), (None, "Cities.")),
        row((None, "cities"), (None, "towns"), accepted=("villages", "Towns")),
        row((None, "cities"), (None, "rivers"), accepted=("towns",)),
        row((None, "cities"), None, accepted=("",)),
    ]
    assert description_match(scored) == pytest.approx(2 / 4)
    assert exact_match(scored) == pytest.approx(1 / 4)


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        (" Paris. ", "paris", True),
        ("Paris .", "paris", True),
        ("Paris..", "paris", False),
        (unicodedata.normalize("NFD", "Köln"), "KÖLN", True),
        ("STRASSE", "straße", True),
        (".", "", False),
        ("U.S", "US", False),
    ],
)
def test_content_comparison(left: str, right: str, same: bool) -> None:
    assert (normalize(left) == normalize(right)) is same


def test_paper_exact_match_compares_whole_answers() -> None:
    reference = "The most likely output would change to <<<Greek>>>."
    same = row(CHANGED, CHANGED, text="the most likely output would change to <<<greek>>>", reference=reference)
    other = row(CHANGED, CHANGED, text="The output would change to <<<Greek>>>.", reference=reference)
    assert [paper_compat_exact_match([scored]) for scored in (same, other)] == [1, 0]
    assert [exact_match([scored]) for scored in (same, other)] == [1, 1]


def test_no_rows_have_no_value() -> None:
    assert all(math.isnan(metric([])) for metric in METRICS.values())


def test_every_metric_is_listed_under_its_name_with_a_definition() -> None:
    assert all(name == metric.name and "Denominator" in metric.definition for name, metric in METRICS.items())


def test_f1_refuses_truths_without_a_verdict() -> None:
    with pytest.raises(AssertionError, match="record r has no changed/unchanged verdict"):
        has_changed_f1([row((None, "x"), (None, "x"))])
