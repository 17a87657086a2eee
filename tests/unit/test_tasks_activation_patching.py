"""Activation patching: who is paired with whom, and that every record says what a plain forward pass says."""

from collections import Counter, defaultdict

import pyarrow as pa
import pytest
import torch
from task_helpers import WIDTH, fact, say_various, says_only, says_text, split_by, tiny_target
from tiny_models import blocks_of, clean_residuals

from introspect_ray.config import ActivationPatchingConfig, GenerateConfig, SplitConfig
from introspect_ray.data.splits import splitter
from introspect_ray.data.writer import generate_records
from introspect_ray.explainer.query import Vector
from introspect_ray.tasks.activation_patching import KINDS, ActivationPatching
from introspect_ray.tasks.base import Answer, stable_id

TASK = ActivationPatching()
CONFIG = GenerateConfig()
SPLIT = splitter(SplitConfig())
CITIES = ("Paris", "Berlin", "Rome", "Madrid", "Oslo", "Athens", "Lisbon", "Vienna")


def many_facts():
    """90 subjects of two relations that overlap in part, one relation in two templates, and rows without a partner."""
    rows = []
    for number in range(90):
        subject = f"Person {number}"
        if number % 3:
            template = "The city of {} is" if number % 4 else "{} was born in"
            rows.append(fact(len(rows), subject, CITIES[number * 7 % 8], "city", template))
        if number % 2:
            rows.append(fact(len(rows), subject, ("red", "green", "blue")[number % 3], "colour", "{} likes"))
    rows.append(fact(len(rows), "Hermit", "nowhere", "solitude", "{} lives"))
    rows += [fact(len(rows) + number, f"Twin {number}", "same", "equal", "{} is the") for number in range(5)]
    return rows


def test_pairs_stay_in_their_split_and_groups_are_independent():
    rows = many_facts()
    plan = TASK.plan(rows, CONFIG, SPLIT)
    truth = {(row["subject"], row["relation_id"], row["template"]): row["target_true"] for row in rows}
    answers = defaultdict(set)
    for row in rows:
        answers[row["relation_id"]].add(row["target_true"])
    groups, members = defaultdict(set), defaultdict(set)
    assert {item["split"] for item in plan.items} == {"train", "validation", "test"}
    for item in plan.items:
        one, other = item["subject"], item["other_subject"]
        assert item["split"] == SPLIT(one) == SPLIT(other)
        assert one != other and item["answer"] != item["other_answer"]
        assert item["answer"] == truth[one, item["relation_id"], item["template"]]
        assert item["other_answer"] == truth[other, item["relation_id"], item["template"]]
        assert {item["answer"], item["other_answer"]} <= set(item["options"]) <= answers[item["relation_id"]]
        assert len(set(item["options"])) == len(item["options"]) == min(6, len(answers[item["relation_id"]]))
        if item["split"] != "train":
            for subject in (one, other):
                groups[subject].add(item["group"])
                members[item["group"]].add(subject)
    assert groups and all(len(of_subject) == 1 for of_subject in groups.values())
    # A group of four, and one more where a subject would be left alone.
    assert max(map(len, members.values())) <= 5 and min(map(len, members.values())) >= 2
    assert len(members) > 3
    partners = Counter((item["subject"], item["relation_id"], item["template"]) for item in plan.items)
    assert max(partners.values()) == CONFIG.activation_patching.pairs_per_subject
    assert len({item["item_id"] for item in plan.items}) == len(plan.items)
    places = Counter(item["options"].index(item["answer"]) for item in plan.items if len(item["options"]) == 6)
    assert len(places) == 6, "the true answer is at every place among the options"


def test_rows_that_no_pair_uses_are_rejected_with_the_reason():
    rows = many_facts()
    plan = TASK.plan(rows, CONFIG, SPLIT)
    used = {(item[key], item["relation_id"]) for item in plan.items for key in ("subject", "other_subject")}
    unused = [row["row"] for row in rows if (row["subject"], row["relation_id"]) not in used]
    assert sorted(plan.rejected) == [(row, "no_partner") for row in unused]
    assert {row["row"] for row in rows if row["relation_id"] in ("solitude", "equal")} <= set(unused)
    assert plan.num_source_rows == len(rows)


def test_items_do_not_depend_on_the_order_of_rows_and_their_ids_are_pinned():
    rows = many_facts()
    by_id = {item["item_id"]: item for item in TASK.plan(rows, CONFIG, SPLIT).items}
    for other_order in (rows[::-1], rows[1::2] + rows[::2]):
        for numbers in (0, 1000):
            moved = [{**row, "row": number + numbers} for number, row in enumerate(other_order)]
            assert {item["item_id"]: item for item in TASK.plan(moved, CONFIG, SPLIT).items} == by_id
    other = GenerateConfig(activation_patching=ActivationPatchingConfig(instruction=" ({options})"))
    assert not by_id.keys() & {item["item_id"] for item in TASK.plan(rows, other, SPLIT).items}
    pair = [fact(0, "Ann", "Rome"), fact(1, "Bob", "Oslo")]
    items = TASK.plan(pair, CONFIG, split_by(train=["Ann", "Bob"])).items
    assert sorted((item["subject"], item["other_subject"], item["item_id"]) for item in items) == PINNED


PINNED = [("Ann", "Bob", "515973b8ef334b2c"), ("Bob", "Ann", "77b3293e4f154702")]


@pytest.mark.parametrize(("count", "sizes"), [(1, []), (2, [2]), (4, [4]), (5, [5]), (6, [2, 4]), (9, [4, 5])])
def test_test_subjects_fall_into_small_groups(count, sizes):
    subjects = [f"S{number}" for number in range(count)]
    rows = [fact(number, subject, CITIES[number % 8]) for number, subject in enumerate(subjects)]
    found = defaultdict(set)
    for item in TASK.plan(rows, CONFIG, split_by(test=subjects)).items:
        found[item["group"]] |= {item["subject"], item["other_subject"]}
    assert sorted(map(len, found.values())) == sizes


# --- generate ---------------------------------------------------------------------------------------------------

SUBJECTS = ("Ann", "Marta Olsen", "Zoë Çelik", "Bo [[x]]", "the cat sat", "Paris")
FACTS = [
    fact(number, subject, answer, template="The old city of {} is called")
    for number, (subject, answer) in enumerate(
        zip(SUBJECTS, ("Rome", "Oslo", "São Tomé", "Oslo", "Rome", "Bern"), strict=True)
    )
]
PROMPTS = [row["prompt"] + CONFIG.activation_patching.instruction for row in FACTS]


def patched(model, ids, layers, position, vector):
    """The most likely next token after one full forward pass in which plain hooks overwrite one position."""

    def overwrite(_module, _inputs, output):
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden[0, position] = vector
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    hooks = [blocks_of(model)[layer].register_forward_hook(overwrite) for layer in layers]
    try:
        with torch.no_grad():
            return int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
    finally:
        for hook in hooks:
            hook.remove()


def last_characters(text, item, subject):
    """Kind -> index of the character that its token must hold, read off the text."""
    start = text.index("one of ") + len("one of ")
    listing = text[start : text.index(" and nothing else")]
    assert listing.split(" or ") == item["options"]
    places = {}
    for option in item["options"]:
        places[option] = text.index(option, start) + len(option) - 1
        start = places[option] + 1
    found = {
        "subject_end": text.index(subject) + len(subject) - 1,
        "relation": text.index(" is called") + len(" is called") - 1,
        "original_option": places[item["answer"]],
        "new_option": places[item["other_answer"]],
        "question": len(text) - 1,
    }
    others = [option for option in item["options"] if option not in (item["answer"], item["other_answer"])]
    return found | ({"other_option": places[others[0]]} if others else {})


def token_at(tokenizer, text, character):
    """Index of the last token that holds a character, and the tokens of the text."""
    encoded = tokenizer(text, return_offsets_mapping=True)
    holding = [i for i, (start, end) in enumerate(encoded["offset_mapping"]) if start <= character < end]
    return holding[-1], encoded["input_ids"]


@pytest.fixture(scope="module", params=[("llama", True), ("qwen3", False)], ids=["llama", "qwen3"])
def generated(request):
    """(target, items by id, records), as a worker makes them."""
    target = tiny_target(*request.param)
    says_text(target)
    say_various(target, PROMPTS)
    plan = TASK.plan(FACTS, CONFIG, lambda _: "train")
    assert not plan.rejected
    return target, {item["item_id"]: item for item in plan.items}, generate_records(TASK, target, plan.items, CONFIG)


def test_every_block_and_kind_of_every_pair_is_a_record(generated):
    target, items, records = generated
    assert {record["status"] for record in records} == {"ok"}, [r["detail"] for r in records if r["status"] != "ok"][:1]
    assert len({record["record_id"] for record in records}) == len(records)
    found = Counter((record["item_id"], record["block"], record["kind"]) for record in records)
    assert found == Counter((item, block, kind) for item in items for block in range(4) for kind in KINDS)
    sizes = [2, 1, 1, 1] if target.num_layers == 5 else [1, 1, 1, 1]
    layers = {record["block"]: record["layers"] for record in records}
    assert [len(layers[block]) for block in range(4)] == sizes
    assert [layer for block in range(4) for layer in layers[block]] == list(range(target.num_layers))
    assert 0.05 < sum(record["changed"] for record in records) / len(records) < 0.95
    schema = TASK.schema(WIDTH, CONFIG)
    assert all(set(record) == set(schema.names) for record in records)


def test_truth_is_what_a_plain_forward_pass_says(generated):
    target, items, records = generated
    tokenizer, model = target.tokenizer, target.model
    # 17 shares no factor with the 24 records of an item, so that all blocks and kinds come up.
    sample = records[::17] + [record for record in records if record["changed"]][::3]
    assert {record["kind"] for record in sample} == set(KINDS)
    assert {record["block"] for record in sample} == {0, 1, 2, 3}
    assert {record["changed"] for record in sample} == {True, False}
    for record in sample:
        item, text, other = items[record["item_id"]], record["text"], record["other_text"]
        assert other == text.replace(item["subject"], item["other_subject"])
        character = last_characters(text, item, item["subject"])[record["kind"]]
        position, ids = token_at(tokenizer, text, character)
        assert record["position"] == position
        assert record["token_start"] <= character < record["token_end"]
        away = last_characters(other, item, item["other_subject"])[record["kind"]]
        from_position, other_ids = token_at(tokenizer, other, away)
        residuals = clean_residuals(model, other_ids)
        vector = sum(residuals[layer, from_position] for layer in record["layers"]) / len(record["layers"])
        assert torch.allclose(torch.tensor(record["vector"]), vector, atol=1e-4)
        with torch.no_grad():
            before = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        after = patched(model, ids, record["layers"], position, vector)
        assert record["original"] == tokenizer.decode([before]).strip()
        assert record["content"] == tokenizer.decode([after]).strip()
        assert record["changed"] is (record["content"] != record["original"])


def test_two_tokens_that_say_the_same_are_no_change():
    target = tiny_target("llama", bos=True)
    says_only(target, (" c", "c"))
    say_various(target, PROMPTS)
    records = generate_records(TASK, target, TASK.plan(FACTS, CONFIG, lambda _: "train").items, CONFIG)
    assert {(record["original"], record["content"], record["changed"]) for record in records} == {("c", "c", False)}
    spoken = set()
    for record in records[::17]:
        ids = target.tokenizer(record["text"]).input_ids
        vector = torch.tensor(record["vector"])
        spoken.add(patched(target.model, ids, record["layers"], record["position"], vector))
    assert len(spoken) == 2, "patches did lead to another token"


@pytest.mark.parametrize("unsaid", ["\n", "\x80"], ids=["blank", "part of a character"])
def test_an_answer_without_text_is_a_row_with_that_reason(unsaid):
    target = tiny_target("llama", bos=True)
    says_only(target, ("A", "B"))
    head, tokenizer = target.model.get_output_embeddings().weight, target.tokenizer
    # The byte 0x80 alone, which no text can spell.
    token = tokenizer.convert_tokens_to_ids("\u0122") if unsaid == "\x80" else tokenizer(unsaid).input_ids[-1]
    says = tokenizer.decode([token]).strip()
    assert says in ("", "\ufffd")
    other = tokenizer("B", add_special_tokens=False).input_ids[0]
    with torch.no_grad():
        head[token], head[other] = head[other].clone(), 0
    items = TASK.plan(FACTS, CONFIG, lambda _: "train").items
    records = generate_records(TASK, target, items, CONFIG)
    assert {record["status"] for record in records} == {"ok", "answer_has_no_text"}
    whole, cells = set(), set()
    for record in records:
        if record["status"] == "ok":
            assert (record["original"], record["content"], record["changed"]) == ("A", "A", False)
        elif record["detail"] == f"without a patch the target says {says!r}":
            whole.add(record["item_id"])
        else:
            assert record["detail"].startswith("patched at ") and record["detail"].endswith(f"says {says!r}")
            cells.add(record["record_id"])
    counts = Counter(record["item_id"] for record in records)
    assert cells and all(counts[item["item_id"]] == (1 if item["item_id"] in whole else 24) for item in items)


def test_an_item_alone_gives_the_records_that_it_gives_among_others(generated):
    target, items, records = generated
    item = list(items.values())[-1]
    among = [record for record in records if record["item_id"] == item["item_id"]]
    for one, two in zip(TASK.generate(target, [item], CONFIG), among, strict=True):
        assert {k: v for k, v in one.items() if k != "vector"} == {k: v for k, v in two.items() if k != "vector"}
        assert abs(one["vector"] - two["vector"]).max() < 1e-4


def test_a_kind_that_a_prompt_lacks_gives_no_record():
    target = tiny_target("llama", bos=True)
    rows = [fact(0, "Ann", "Rome", template="Home of {}"), fact(1, "Bob", "Oslo", template="Home of {}")]
    plan = TASK.plan(rows, CONFIG, lambda _: "train")
    records = TASK.generate(target, plan.items, CONFIG)
    assert {record["kind"] for record in records} == set(KINDS) - {"relation", "other_option"}


# --- select -----------------------------------------------------------------------------------------------------


def lopsided_table():
    """Cells of (changed, unchanged) records: 3 and 10, 50 and 0, 1 and 40, 7 and 7; every cell has a failed record."""
    cells = {
        ("train", 0, "relation"): (3, 10),
        ("train", 1, "relation"): (50, 0),
        ("test", 0, "relation"): (1, 40),
        ("test", 0, "question"): (7, 7),
    }
    rows = []
    for (split, block, kind), counts in cells.items():
        for changed, count in zip((True, False), counts, strict=True):
            for number in range(count):
                name = stable_id(split, block, kind, changed, number)
                rows.append(
                    {
                        "record_id": name,
                        "status": "ok",
                        "split": split,
                        "block": block,
                        "kind": kind,
                        "changed": changed,
                    }
                )
        rows.append({"record_id": f"failed {len(rows)}", "status": "no_position_found", "split": split})
    return pa.Table.from_pylist(rows), rows


def test_selection_balances_every_cell_and_keeps_a_floor_of_the_larger_class():
    table, rows = lopsided_table()
    floor = GenerateConfig(activation_patching=ActivationPatchingConfig(majority_floor=0.1))
    selected = TASK.select(table, floor)
    assert len(set(selected)) == len(selected)
    by_id = {row["record_id"]: row for row in rows}
    assert {by_id[one]["status"] for one in selected} == {"ok"}
    found = Counter((r["split"], r["block"], r["kind"], r["changed"]) for r in (by_id[one] for one in selected))
    assert found == {
        ("train", 0, "relation", True): 3,
        ("train", 0, "relation", False): 3,
        ("train", 1, "relation", True): 5,
        ("test", 0, "relation", True): 1,
        ("test", 0, "relation", False): 4,
        ("test", 0, "question", True): 7,
        ("test", 0, "question", False): 7,
    }
    assert TASK.select(table.take(list(range(table.num_rows))[::-1]), floor) == selected
    everything = GenerateConfig(activation_patching=ActivationPatchingConfig(balance=False))
    assert TASK.select(table, everything) is None


# --- render, parse, display -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content", ["Rome", "", "]]", "a: b", "(changed)", "x (unchanged)", "two\nlines", "[[", "\ufffd"]
)
@pytest.mark.parametrize("changed", [True, False])
def test_an_answer_survives_rendering_and_parsing(generated, content, changed):
    record = generated[2][0] | {"content": content, "changed": changed}
    assert TASK.parse(TASK.render(record).answer) == Answer(changed, content) == TASK.truth(record)


def test_query_marks_the_token_and_display_gives_the_whole_text(generated):
    for record in generated[2][::7]:
        text, marked = record["text"], record["text"][record["token_start"] : record["token_end"]]
        pieces, details = TASK.display(record)
        assert "".join(piece for piece, _ in pieces) == text
        assert [piece for piece, is_marked in pieces if is_marked] == [marked] and marked
        assert details["vector from"] == record["other_text"]
        before, vector, after = TASK.render(record).query.parts
        assert isinstance(vector, Vector) and vector.layers == tuple(record["layers"])
        assert (vector.values == record["vector"]).all()
        # The vector stands right after the token that it replaces.
        assert before.endswith(text[: record["token_end"]]) and after.startswith(text[record["token_end"] :])
        head = before.removesuffix(text[: record["token_end"]])
        assert f"layers {record['layers'][0]} to {record['layers'][-1]} " in head
        assert TASK.accepted(record) == ()


def test_a_prompt_beyond_the_window_is_a_row_with_that_reason_and_costs_no_other():
    target = tiny_target("llama", bos=True)
    long = "The city of {} is " + "cat " * 600
    rows = [fact(0, "Ann", "Paris"), fact(1, "Bob", "Rome")]
    rows += [fact(2, "Cat", "Oslo", "P2", long), fact(3, "Dan", "Rome", "P2", long)]
    items = TASK.plan(rows, CONFIG, lambda _: "train").items
    records = TASK.generate(target, items, CONFIG)
    failures = [record for record in records if record["status"] == "prompt_too_long"]
    assert [record["item_id"] for record in failures] == [one["item_id"] for one in items if one["relation_id"] == "P2"]
    assert all(record["detail"].endswith("tokens, the target takes at most 512") for record in failures)
    short = [one for one in items if one["relation_id"] == "P1"]
    ids = [record["record_id"] for record in TASK.generate(target, short, CONFIG)]
    assert [record["record_id"] for record in records if record["status"] == "ok"] == ids
