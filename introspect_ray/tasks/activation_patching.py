"""Task 2, activation patching (P1, section 2.3 and footnote 4).

Prompts x and x' differ in their subject. The residual stream of x' at one token, averaged over a block of layers,
replaces that of x at the token of the same kind in every layer of the block. Does the most likely next token change,
and to what? Searched exhaustively over blocks and six kinds of positions, then balanced.

Against P1: pairs never cross splits; in validation and test, subjects are paired only within small groups, which are
then independent units for intervals; the query holds the vector inside the text,
right after the token that it replaces, so that an explainer can read on as the target would.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from introspect_ray.config import ActivationPatchingConfig, GenerateConfig
from introspect_ray.explainer.query import Query, Vector
from introspect_ray.interventions.target import Target
from introspect_ray.interventions.types import CleanRun, Intervention
from introspect_ray.models.structure import layer_blocks
from introspect_ray.models.tokens import position_of, token_text
from introspect_ray.tasks.base import (
    COMMON_FIELDS,
    OK,
    Example,
    Item,
    Plan,
    Record,
    SplitOf,
    failed,
    stable_id,
    too_long,
)
from introspect_ray.tasks.verdict import NO_TEXT, VerdictTask, has_text

KINDS = ("subject_end", "relation", "original_option", "new_option", "other_option", "question")
"""P1's six kinds of positions: the last token of the subject, factual prompt, three options, and whole prompt."""

PROMPTS_PER_PASS = 16
"""Clean runs held in memory at once; each is a residual stream and a cache of one prompt."""


def options_text(options: Sequence[str]) -> str:
    return " or ".join(options)


@dataclass(frozen=True)
class Prompt:
    """One prompt, tokenized, and the token position of every kind that it has."""

    text: str
    ids: list[int]
    offsets: list[tuple[int, int]]
    positions: dict[str, int]


class ActivationPatching(VerdictTask):
    name: ClassVar[str] = "activation_patching"
    has_vectors: ClassVar[bool] = True
    breakdowns: ClassVar[Mapping[str, str]] = {"Layer block": "block", "Kind of position": "kind"}
    unshared: ClassVar[tuple[str, ...]] = ("subject", "other_subject")
    selected_by: ClassVar[tuple[str, ...]] = ("block", "kind", "changed")
    source_formats: ClassVar[tuple[str, ...]] = ("counterfact", "known_facts")

    def schema(self, width: int, config: GenerateConfig) -> pa.Schema:
        vector_type = pa.float16() if config.vector_dtype == "float16" else pa.float32()
        return pa.schema(
            [
                *COMMON_FIELDS,
                pa.field("subject", pa.string()),
                pa.field("other_subject", pa.string()),
                pa.field("relation_id", pa.string()),
                pa.field("text", pa.string()),
                pa.field("other_text", pa.string()),
                pa.field("block", pa.int32()),
                pa.field("layers", pa.list_(pa.int32())),
                pa.field("kind", pa.string()),
                pa.field("position", pa.int32()),
                pa.field("token_start", pa.int32()),
                pa.field("token_end", pa.int32()),
                pa.field("original", pa.string()),
                pa.field("content", pa.string()),
                pa.field("changed", pa.bool_()),
                pa.field("vector", pa.fixed_shape_tensor(vector_type, (width,))),
            ]
        )

    def plan(self, rows: Sequence[Mapping[str, Any]], config: GenerateConfig, split_of: SplitOf) -> Plan:
        """Ordered prompt pairs of one relation and template whose answers differ; a used row is an x or an x'."""
        settings = config.activation_patching
        plan = Plan(num_source_rows=len(rows))
        answers: dict[str, set[str]] = defaultdict(set)
        by_prompt: dict[tuple[str, str, str], list[Mapping[str, Any]]] = defaultdict(list)
        for row in rows:
            answers[row["relation_id"]].add(row["target_true"])
            by_prompt[split_of(row["subject"]), row["relation_id"], row["template"]].append(row)
        groups = _groups(rows, split_of, settings.subjects_per_group)
        used: set[int] = set()
        for (split, relation_id, template), members in sorted(by_prompt.items()):
            for one, other in _pairs(members, split, groups, settings.pairs_per_subject):
                used |= {one["row"], other["row"]}
                options = _options(one, other, answers[relation_id], settings.num_options, config.seed)
                item = {
                    "split": split,
                    "group": groups[one["subject"]],
                    "relation_id": relation_id,
                    "template": template,
                    "subject": one["subject"],
                    "other_subject": other["subject"],
                    "answer": one["target_true"],
                    "other_answer": other["target_true"],
                    "options": options,
                }
                plan.items.append({"item_id": stable_id(self.name, item, settings.instruction), **item})
        plan.rejected = [(row["row"], "no_partner") for row in rows if row["row"] not in used]
        return plan

    def generate(self, target: Target, items: Sequence[Item], config: GenerateConfig) -> list[Record]:
        records: list[Record] = []
        for start in range(0, len(items), PROMPTS_PER_PASS):
            records += self._generate_pass(target, items[start : start + PROMPTS_PER_PASS], config.activation_patching)
        return records

    def _generate_pass(self, target: Target, items: Sequence[Item], config: ActivationPatchingConfig) -> list[Record]:
        """Every block and kind of every item, sharing one clean run per distinct prompt."""
        blocks = layer_blocks(target.num_layers, config.num_blocks)
        failures: list[Record] = []
        kept: list[Item] = []
        pairs: list[tuple[Prompt, Prompt]] = []
        for item in items:
            one, other = (_prompt(target, item, item[name], config) for name in ("subject", "other_subject"))
            if (failure := too_long(target, item, one.ids, other.ids)) is not None:
                failures.append(failure)
                continue
            kept.append(item)
            pairs.append((one, other))
        if not pairs:
            return failures
        distinct = {prompt.text: prompt for pair in pairs for prompt in pair}
        runs = dict(zip(distinct, target.clean_runs([prompt.ids for prompt in distinct.values()]), strict=True))
        cells = [
            [
                (block, kind)
                for block in range(len(blocks))
                for kind in KINDS
                if kind in one.positions and kind in other.positions
            ]
            for one, other in pairs
        ]
        vectors = [
            [
                runs[other.text].residuals[list(blocks[block]), other.positions[kind]].float().mean(0)
                for block, kind in todo
            ]
            for (_, other), todo in zip(pairs, cells, strict=True)
        ]
        interventions = [
            [
                Intervention(
                    layers=blocks[block], positions=(one.positions[kind],), vectors=vector[None], mode="replace"
                )
                for (block, kind), vector in zip(todo, found, strict=True)
            ]
            for (one, _), todo, found in zip(pairs, cells, vectors, strict=True)
        ]
        logits = target.patched_logits([runs[one.text] for one, _ in pairs], interventions)
        return failures + [
            record
            for item, pair, todo, found, after in zip(kept, pairs, cells, vectors, logits, strict=True)
            for record in self._records(
                target, item, pair, runs[pair[0].text], todo, blocks, found, after.argmax(-1).tolist()
            )
        ]

    def _records(
        self,
        target: Target,
        item: Item,
        pair: tuple[Prompt, Prompt],
        clean: CleanRun,
        cells: Sequence[tuple[int, str]],
        blocks: Sequence[tuple[int, ...]],
        vectors: Sequence[Any],
        after: Sequence[int],
    ) -> Iterator[Record]:
        if not cells:
            yield failed(item, "no_position_found", f"none of {', '.join(KINDS)} in both prompts")
            return
        one, other = pair
        original = token_text(target.tokenizer, int(clean.logits.argmax()))
        if not has_text(original):
            yield failed(item, NO_TEXT, f"without a patch the target says {original!r}")
            return
        for (block, kind), vector, token in zip(cells, vectors, after, strict=True):
            position, content = one.positions[kind], token_text(target.tokenizer, token)
            record_id = stable_id(item["item_id"], block, kind)
            if not has_text(content):
                detail = f"patched at {kind} in block {block} the target says {content!r}"
                yield {**failed(item, NO_TEXT, detail), "record_id": record_id}
                continue
            yield {
                "record_id": record_id,
                "status": OK,
                "detail": None,
                **{key: item[key] for key in ("item_id", "split", "group", "subject", "other_subject", "relation_id")},
                "text": one.text,
                "other_text": other.text,
                "block": block,
                "layers": list(blocks[block]),
                "kind": kind,
                "position": position,
                "token_start": one.offsets[position][0],
                "token_end": one.offsets[position][1],
                "original": original,
                "content": content,
                "changed": content != original,
                "vector": vector.cpu().numpy(),
            }

    def select(self, records: pa.Table, config: GenerateConfig) -> list[str] | None:
        """Equally many changed and unchanged records per (split, block, kind), chosen by record id (a stable hash).

        A cell whose smaller class is nearly empty keeps a share of its larger class (`majority_floor`)."""
        if not config.activation_patching.balance:
            return None
        cells: dict[tuple[str, int, str], dict[bool, list[str]]] = defaultdict(lambda: {True: [], False: []})
        for batch in records.select(["record_id", "status", "split", *self.selected_by]).to_batches(max_chunksize=4096):
            for record in batch.to_pylist():
                if record["status"] == OK:
                    cell = cells[record["split"], record["block"], record["kind"]]
                    cell[record["changed"]].append(record["record_id"])
        selected: list[str] = []
        for classes in cells.values():
            smaller, larger = sorted(classes.values(), key=len)
            keep = max(len(smaller), round(config.activation_patching.majority_floor * len(larger)))
            selected += [*smaller, *sorted(larger)[:keep]]
        return sorted(selected)

    def render(self, record: Record) -> Example:
        text, start, end = record["text"], record["token_start"], record["token_end"]
        layers = tuple(int(layer) for layer in record["layers"])
        head = f'What if layers {layers[0]} to {layers[-1]} had another vector at "{text[start:end].strip()}"?\n'
        query = Query((head + text[:end], Vector(np.asarray(record["vector"], dtype=np.float32), layers), text[end:]))
        return Example(query, self.wording.render(self.truth(record)))

    def display(self, record: Record) -> tuple[list[tuple[str, bool]], dict[str, str]]:
        text, start, end = record["text"], record["token_start"], record["token_end"]
        pieces = [(text[:start], False), (text[start:end], True), (text[end:], False)]
        return pieces, {
            "layers": f"{record['layers'][0]} to {record['layers'][-1]}",
            "position": record["kind"].replace("_", " "),
            "vector from": record["other_text"],
            "without the patch": record["original"],
        }


def _groups(rows: Sequence[Mapping[str, Any]], split_of: SplitOf, size: int) -> dict[str, str]:
    """Subject -> group. Subjects of one relation and split are put together, `size` at a time, in hash order.

    In training the group is the subject itself: nothing is estimated there, and pairs may be formed freely.
    """
    by_relation: dict[tuple[str, str], set[str]] = defaultdict(set)
    for row in rows:
        by_relation[split_of(row["subject"]), row["relation_id"]].add(row["subject"])
    groups: dict[str, str] = {}
    for (split, _), subjects in sorted(by_relation.items(), key=lambda entry: (-len(entry[1]), entry[0])):
        free = sorted((subject for subject in subjects if subject not in groups), key=stable_id)
        step = 1 if split == "train" else size
        for start in range(0, len(free), step):
            members = free[start : start + step]
            lonely = split != "train" and len(members) == 1 and start > 0
            name = groups[free[start - 1]] if lonely else stable_id("group", members)
            groups.update(dict.fromkeys(members, name))
    return groups


def _pairs(
    rows: Sequence[Mapping[str, Any]], split: str, groups: Mapping[str, str], partners: int
) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """(x, x') of different subjects and answers, at most `partners` for every x, within groups outside training."""
    clusters: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: stable_id(row["subject"], row["target_true"])):
        clusters["" if split == "train" else groups[row["subject"]]].append(row)
    for _, cluster in sorted(clusters.items()):
        for index, one in enumerate(cluster):
            others = cluster[index + 1 :] + cluster[:index]
            fitting = (
                other
                for other in others
                if other["subject"] != one["subject"] and other["target_true"] != one["target_true"]
            )
            yield from ((one, other) for other, _ in zip(fitting, range(partners), strict=False))


def _options(one: Mapping[str, Any], other: Mapping[str, Any], answers: set[str], count: int, seed: int) -> list[str]:
    """Both true answers and others of the relation, as many as there are up to `count`, in an order fixed by a hash."""
    key = (one["subject"], other["subject"], one["template"], seed)
    wanted = [one["target_true"], other["target_true"]]
    others = sorted(answers - set(wanted), key=lambda value: stable_id("draw", *key, value))
    return sorted([*wanted, *others[: count - 2]], key=lambda value: stable_id("order", *key, value))


def _prompt(target: Target, item: Item, subject: str, config: ActivationPatchingConfig) -> Prompt:
    """The prompt about `subject` and the last token of each kind's span; `other_option` is the first distractor."""
    fact = item["template"].replace("{}", subject)
    before, after = config.instruction.split("{options}")
    text = fact + before + options_text(item["options"]) + after
    ids, offsets = target.encode_with_offsets(text)
    start = item["template"].index("{}")
    spans = {"subject_end": (start, start + len(subject)), "relation": (start + len(subject), len(fact))}
    option_start = len(fact) + len(before)
    distractors = [value for value in item["options"] if value not in (item["answer"], item["other_answer"])]
    for value in item["options"]:
        kind = {item["answer"]: "original_option", item["other_answer"]: "new_option"}.get(value)
        if kind is None and value == distractors[0]:
            kind = "other_option"
        if kind:
            spans[kind] = (option_start, option_start + len(value))
        option_start += len(value) + len(options_text(["", ""]))
    spans["question"] = (len(text) - 1, len(text))
    positions = {kind: position_of(offsets, *span) for kind, span in spans.items() if span[1] > span[0]}
    assert all(first <= last for first, last in pairwise([offset for offset in offsets if offset[1] > 0])), text
    return Prompt(text, ids, offsets, positions)
