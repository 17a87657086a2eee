"""Input ablation: what is taken out, and that every record says what two plain greedy answers say."""

from collections import Counter
from itertools import permutations

import pyarrow as pa
import pytest
from task_helpers import WIDTH, greedy, say_various, says_only, says_text, tiny_target

from introspect_ray.config import POCKET_QUESTIONS, GenerateConfig, InputAblationConfig
from introspect_ray.data.writer import generate_records
from introspect_ray.tasks.base import OK, Answer
from introspect_ray.tasks.input_ablation import InputAblation, question_text

TASK = InputAblation()
LETTERS = GenerateConfig(task="input_ablation")
TEXTS = GenerateConfig(task="input_ablation", input_ablation=POCKET_QUESTIONS)
WORDS = ("cat", "mat", "Paris", "France")


def question(row, choices=WORDS, answer=0, text="Which is it, number {}?"):
    """A normalised MMLU row."""
    return {"row": row, "question": text.format(row), "subject": "trivia", "choices": list(choices), "answer": answer}


def items_of(rows, config):
    plan = TASK.plan(rows, config, lambda _: "test")
    assert (plan.rejected, plan.num_source_rows, len(plan.items)) == ([], len(rows), len(rows))
    return plan.items


def with_policy(policy, seed=0):
    return GenerateConfig(task="input_ablation", input_ablation=InputAblationConfig(policy=policy), seed=seed)


# --- prompts ----------------------------------------------------------------------------------------------------

HOSTILE = [
    ("Why {hint}?", ("{options}", "{question}", "Hint: A", "{letter}{choice}")),
    ("One\nHint: B\nAnswer: C", ("a\nb", "]]", ": ", "\u202e")),
]


@pytest.mark.parametrize(("stem", "choices"), [("Which?", WORDS), *HOSTILE])
def test_without_its_hint_a_prompt_is_the_question_without_a_hint(stem, choices):
    one, two, three, four = choices
    plain = f"{stem}\nA. {one}\nB. {two}\nC. {three}\nD. {four}\nAnswer:"
    hinted, span = question_text(stem, choices, 2, LETTERS.input_ablation)
    assert hinted == plain.removesuffix("\nAnswer:") + "\nHint: C\nAnswer:"
    assert hinted[span[0] : span[1]] == "\nHint: C" and hinted[: span[0]] + hinted[span[1] :] == plain
    assert question_text(stem, choices, None, LETTERS.input_ablation) == (plain, None)
    plain = f"{stem}\nChoose {one} or {two} or {three} or {four}.\nAnswer:"
    hinted, span = question_text(stem, choices, 1, POCKET_QUESTIONS)
    assert hinted[span[0] : span[1]] == f"\nHint: {two}" and hinted[: span[0]] + hinted[span[1] :] == plain
    assert question_text(stem, choices, None, POCKET_QUESTIONS) == (plain, None)


def test_a_hint_may_stand_anywhere_in_the_layout():
    layout = InputAblationConfig(question="{hint}{question} {options}:", option="{letter}={choice}", separator=",")
    text, span = question_text("Which?", ("x", "y"), 1, layout)
    assert (text, span) == ("\nHint: BWhich? A=x,B=y:", (0, 8))


# --- plan -------------------------------------------------------------------------------------------------------


def test_hints_follow_the_policy():
    rows = [question(row, answer=row % 4) for row in range(400)]
    relative = {
        policy: Counter((item["hinted"] - item["correct"]) % 4 for item in items_of(rows, with_policy(policy)))
        for policy in ("correct", "wrong", "random")
    }
    assert relative["correct"] == {0: 400}
    assert set(relative["wrong"]) == {1, 2, 3} and min(relative["wrong"].values()) > 400 / 3 - 40
    assert set(relative["random"]) == {0, 1, 2, 3} and max(relative["random"].values()) < 100 + 40
    two = [question(row, ("yes", "no"), answer=row % 2) for row in range(50)]
    assert all(item["hinted"] == 1 - item["correct"] for item in items_of(two, with_policy("wrong")))
    drawn = [[item["hinted"] for item in items_of(rows, with_policy("random", seed))] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_questions_of_one_stem_share_group_and_split():
    rows = [question(0), question(1), {**question(2), "question": "Which is it, number 0?", "choices": ["a", "b"]}]
    asked = []
    plan = TASK.plan(rows, LETTERS, lambda key: asked.append(key) or "train")
    assert asked == [row["question"] for row in rows]
    one, other, same = plan.items
    assert one["group"] == same["group"] != other["group"]
    assert len({item["item_id"] for item in plan.items}) == 3
    again = TASK.plan(rows, LETTERS, lambda _: "train").items
    assert [item["item_id"] for item in again] == [item["item_id"] for item in plan.items]


def test_a_question_keeps_id_and_hint_wherever_it_stands_in_the_source():
    spans = [
        {"row": 300 + start, "text": "the cat sat on the mat", "span": [start, start + 4], "subject": "text"}
        for start in range(0, 16, 4)
    ]
    rows = [question(row, answer=row % 4) for row in range(200)] + spans
    by_content = {row.get("question", str(row.get("span"))): row for row in rows}
    assert len(by_content) == len(rows)
    whole = {item["item_id"]: item for item in items_of(rows, with_policy("random"))}
    moved = [{**row, "row": number} for number, row in enumerate(reversed(rows[::3]))]
    thinned = items_of(moved, with_policy("random"))
    assert [whole[item["item_id"]] for item in thinned] == thinned
    # Other options under one stem are another question, with a hint of its own.
    stem = {"question": "Which is it?", "subject": "trivia", "answer": 0}
    drawn = [{**stem, "row": row, "choices": [f"{row}{place}" for place in range(4)]} for row in range(60)]
    assert len({item["hinted"] for item in items_of(drawn, with_policy("random"))}) == 4


# --- generate ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "said", "family", "bos"),
    [(LETTERS, ("A", "B", "C", "D"), "llama", True), (TEXTS, tuple(f" {word}" for word in WORDS), "qwen3", False)],
    ids=["letter", "text"],
)
def test_records_say_what_two_greedy_answers_say(config, said, family, bos):
    target = tiny_target(family, bos)
    says_only(target, said)
    rows = [question(row, answer=row % 4) for row in range(60)]
    items = {item["item_id"]: item for item in items_of(rows, config)}
    records = generate_records(TASK, target, list(items.values()), config)
    answers = [one.strip() for one in said]
    assert [record["item_id"] for record in records] == list(items)
    schema = set(TASK.schema(WIDTH, config).names)
    for record in records:
        item = items[record["item_id"]]
        text, _ = question_text(item["question"], item["choices"], item["hinted"], config.input_ablation)
        plain, _ = question_text(item["question"], item["choices"], None, config.input_ablation)
        with_hint, without = greedy(target, text), greedy(target, plain)
        if not {with_hint, without} <= set(answers):
            assert record["status"] == "answer_names_no_option"
            which, wrong = ("with", with_hint) if with_hint not in answers else ("without", without)
            assert record["detail"] == f"{which} the hint the target says {wrong!r}"
            assert "changed" not in record
            continue
        assert record["status"] == OK and set(record) == schema
        assert (record["text"], record["original"], record["content"]) == (text, with_hint, without)
        assert text[: record["hint_start"]] + text[record["hint_end"] :] == plain
        assert record["changed"] is (with_hint != without)
        assert record["hint"] == answers[item["hinted"]] and record["correct"] == answers[item["correct"]]
        assert record["hint_is"] == ("right hint" if item["hinted"] == item["correct"] else "wrong hint")
        pieces, _ = TASK.display(record)
        assert "".join(piece for piece, _ in pieces) == text
        assert [piece for piece, marked in pieces if marked] == [text[record["hint_start"] : record["hint_end"]]]
        example = TASK.render(record)
        (asked,) = example.query.parts
        assert text in asked and len(asked) > len(text)
        assert TASK.parse(example.answer) == Answer(record["changed"], without) == TASK.truth(record)
    kinds = Counter(record.get("changed") for record in records if record["status"] == OK)
    assert kinds[True] >= 2 and kinds[False] >= 2


def test_any_marked_span_of_a_text_is_ablated_as_a_hint_is():
    target = tiny_target("llama", bos=True)
    says_text(target)
    texts = [f"the {word} sat on the {other} number {row}" for row, (word, other) in enumerate(permutations(WORDS, 2))]
    rows = [
        {"row": 2 * row + half, "text": text, "span": [start, start + 4], "subject": "text"}
        for row, text in enumerate(texts)
        for half, start in enumerate((0, 8))
    ]
    plan = TASK.plan(rows, LETTERS, lambda _: "test")
    assert len({item["item_id"] for item in plan.items}) == 24 and len({item["group"] for item in plan.items}) == 12
    records = generate_records(TASK, target, plan.items, LETTERS)
    for row, record in zip(rows, records, strict=True):
        text, (start, end) = row["text"], row["span"]
        without = text[:start] + text[end:]
        assert (record["status"], record["text"], record["hint"]) == (OK, text, text[start:end].strip())
        assert (record["original"], record["content"]) == (greedy(target, text), greedy(target, without))
        assert record["changed"] is (record["original"] != record["content"])
        assert (record["hint_is"], record["correct"]) == ("marked span", None)
        (asked,) = TASK.render(record).query.parts
        assert asked.endswith(f"{text[:start]}[[{text[start:end]}]]{text[end:]}")
        assert "correct answer" not in TASK.display(record)[1]
    assert len({record["changed"] for record in records}) == 2
    pa.Table.from_pylist(records, TASK.schema(WIDTH, LETTERS))


def test_a_span_after_which_the_target_says_nothing_is_a_row_with_that_reason():
    target = tiny_target("llama", bos=True)
    says_only(target, ("\n", "A"))
    rows = [
        {"row": row, "text": f"the cat sat on number {row}", "span": [0, 4], "subject": "text"} for row in range(12)
    ]
    say_various(target, [row["text"] for row in rows])
    records = generate_records(TASK, target, TASK.plan(rows, LETTERS, lambda _: "test").items, LETTERS)
    details = set()
    for row, record in zip(rows, records, strict=True):
        said = (greedy(target, row["text"]), greedy(target, row["text"][4:]))
        assert record["status"] == ("ok" if all(said) else "answer_has_no_text")
        details.add(record["detail"])
    assert {f"{which} the span the target says ''" for which in ("with", "without")} & details


def test_an_answer_that_names_no_option_is_a_row_with_that_reason():
    target = tiny_target("llama", bos=True)
    says_only(target, ("Z", "Y"))
    items = items_of([question(row) for row in range(3)], LETTERS)
    records = TASK.generate(target, items, LETTERS)
    assert [record["status"] for record in records] == ["answer_names_no_option"] * 3
    assert [record["item_id"] for record in records] == [item["item_id"] for item in items]
    assert all(record["detail"] in [f"with the hint the target says '{one}'" for one in "ZY"] for record in records)
    assert len({record["record_id"] for record in records}) == 3


def test_an_option_that_is_no_single_token_is_a_row_with_that_reason():
    target = tiny_target("llama", bos=True)
    says_only(target, tuple(f" {word}" for word in WORDS))
    rows = [question(0), question(1, (*WORDS[:3], "France and Paris")), question(2)]
    statuses = {}
    for config, name in ((TEXTS, "text"), (LETTERS, "letter")):
        records = TASK.generate(target, items_of(rows, config), config)
        statuses[name] = {record["detail"] for record in records if record["status"] == "answer_no_single_token"}
        assert len(records) == 3
    assert statuses == {"text": {"the answer 'France and Paris' is no single token of the target"}, "letter": set()}


def test_a_prompt_beyond_the_window_is_a_row_with_that_reason_and_costs_no_other():
    target = tiny_target("llama", bos=True)
    says_only(target, ("A", "B", "C", "D"))
    items = items_of([question(0), question(1, text="cat " * 600 + "{}"), question(2)], LETTERS)
    records = TASK.generate(target, items, LETTERS)
    (failure,) = [record for record in records if record["status"] == "prompt_too_long"]
    assert failure["item_id"] == items[1]["item_id"]
    assert failure["detail"].endswith("tokens, the target takes at most 512")
    assert int(failure["detail"].split()[0]) > 600
    alone = [record for one in (items[0], items[2]) for record in TASK.generate(target, [one], LETTERS)]
    assert [record for record in records if record is not failure] == alone
