"""Task 3, input ablation (P1, section 2.4): a multiple-choice question with a hint, or a text with a marked span.

The target answers with the hint and without it (the hint's characters ablated). Does its answer change, and to what?
Against P1: greedy next token of the plain prompt; an answer that names no option is kept as a row with that reason. A
marked span is treated as a hint is, except that the target continues the text as it likes; a continuation without text
is kept as a row with that reason, too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import pyarrow as pa

from introspect_ray.config import GenerateConfig, InputAblationConfig
from introspect_ray.explainer.query import Query
from introspect_ray.interventions.ablation import ablate_text
from introspect_ray.interventions.target import Target
from introspect_ray.models.tokens import single_token, token_text
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

MARKED = "marked span"
"""What `hint_is` says of a span that the source marks."""
_SLOT = re.compile(r"\{question\}|\{options\}")


def letter(index: int) -> str:
    """0 -> A, 1 -> B, ..."""
    return chr(ord("A") + index)


def question_text(
    question: str, choices: Sequence[str], hinted: int | None, config: InputAblationConfig
) -> tuple[str, tuple[int, int] | None]:
    """The prompt, and the hint's character span in it (None without a hint)."""
    options = config.separator.join(
        config.option.replace("{letter}", letter(index)).replace("{choice}", choice)
        for index, choice in enumerate(choices)
    )
    hint = ""
    if hinted is not None:
        hint = config.hint.replace("{letter}", letter(hinted)).replace("{choice}", choices[hinted])
    slots = {"{question}": question, "{options}": options}
    # In one pass, so that text which spells a placeholder stays as it is.
    head, tail = (_SLOT.sub(lambda slot: slots[slot[0]], part) for part in config.question.split("{hint}"))
    return head + hint + tail, (len(head), len(head) + len(hint)) if hint else None


def answers_of(choices: Sequence[str], config: InputAblationConfig) -> list[str]:
    """What the target says for each option: its letter, or its text."""
    return [letter(index) for index in range(len(choices))] if config.answer == "letter" else list(choices)


class InputAblation(VerdictTask):
    name: ClassVar[str] = "input_ablation"
    has_vectors: ClassVar[bool] = False
    breakdowns: ClassVar[Mapping[str, str]] = {"Hint and truth": "hint_is", "Subject": "subject"}
    unshared: ClassVar[tuple[str, ...]] = ()
    selected_by: ClassVar[tuple[str, ...]] = ()
    source_formats: ClassVar[tuple[str, ...]] = ("mmlu", "marked_text")

    def schema(self, width: int, config: GenerateConfig) -> pa.Schema:  # noqa: ARG002 - no vectors here
        return pa.schema(
            [
                *COMMON_FIELDS,
                pa.field("subject", pa.string()),
                pa.field("text", pa.string()),
                pa.field("hint_start", pa.int32()),
                pa.field("hint_end", pa.int32()),
                pa.field("hint", pa.string()),
                pa.field("hint_is", pa.string()),
                pa.field("correct", pa.string()),
                pa.field("original", pa.string()),
                pa.field("content", pa.string()),
                pa.field("changed", pa.bool_()),
            ]
        )

    def plan(self, rows: Sequence[Mapping[str, Any]], config: GenerateConfig, split_of: SplitOf) -> Plan:
        """One item per question or marked span; the group is the question's stem or the text."""
        plan = Plan(num_source_rows=len(rows))
        settings = config.input_ablation
        for row in rows:
            if "span" in row:
                key = ("text", row["text"])
                content = {"text": row["text"], "span": list(row["span"])}
            else:
                key = ("question", row["question"])
                content = {
                    "question": row["question"],
                    "choices": list(row["choices"]),
                    "correct": int(row["answer"]),
                    "hinted": _hinted(row, settings, config.seed),
                }
            item = {"split": split_of(key[1]), "group": stable_id(*key), "subject": row["subject"], **content}
            item_id = stable_id(self.name, item, settings.model_dump())
            plan.items.append({"item_id": item_id, **item})
        return plan

    def generate(self, target: Target, items: Sequence[Item], config: GenerateConfig) -> list[Record]:
        settings = config.input_ablation
        failures: list[Record] = []
        asked: list[tuple[Item, str, tuple[int, int]]] = []
        prompts: list[list[int]] = []
        for item in items:
            text, span = _text_and_span(item, settings)
            ids = target.encode(text)
            failure = too_long(target, item, ids) or _unsayable(target, item, settings)
            if failure is not None:
                failures.append(failure)
                continue
            asked.append((item, text, span))
            prompts.append(ids)
        if not asked:
            return failures
        plain = [target.encode(ablate_text(text, *span)) for _, text, span in asked]
        with_hint, without_hint = (
            [token_text(target.tokenizer, token) for token in logits.argmax(-1).tolist()]
            for logits in target.paired_logits(list(zip(prompts, plain, strict=True)))
        )
        return failures + [
            self._record(item, text, span, one, other, settings)
            for (item, text, span), one, other in zip(asked, with_hint, without_hint, strict=True)
        ]

    def _record(
        self,
        item: Item,
        text: str,
        span: tuple[int, int],
        with_hint: str,
        without_hint: str,
        config: InputAblationConfig,
    ) -> Record:
        if "span" in item:
            for answer, which in ((with_hint, "with"), (without_hint, "without")):
                if not has_text(answer):
                    return failed(item, NO_TEXT, f"{which} the span the target says {answer!r}")
            about = {"hint": text[slice(*span)].strip(), "hint_is": MARKED, "correct": None}
        else:
            answers = answers_of(item["choices"], config)
            for answer, which in ((with_hint, "with"), (without_hint, "without")):
                if answer not in answers:
                    return failed(item, "answer_names_no_option", f"{which} the hint the target says {answer!r}")
            is_right = item["hinted"] == item["correct"]
            about = {
                "hint": answers[item["hinted"]],
                "hint_is": "right hint" if is_right else "wrong hint",
                "correct": answers[item["correct"]],
            }
        return {
            "record_id": stable_id("record", item["item_id"]),
            "status": OK,
            "detail": None,
            **{key: item[key] for key in ("item_id", "split", "group", "subject")},
            "text": text,
            "hint_start": span[0],
            "hint_end": span[1],
            **about,
            "original": with_hint,
            "content": without_hint,
            "changed": with_hint != without_hint,
        }

    def select(self, records: pa.Table, config: GenerateConfig) -> list[str] | None:  # noqa: ARG002 - all ok records count
        return None

    def render(self, record: Record) -> Example:
        text, start, end = record["text"], record["hint_start"], record["hint_end"]
        asked = "What if the hint was removed?\n" + text
        if record["hint_is"] == MARKED:
            asked = f"What if the part in [[ ]] was removed?\n{text[:start]}[[{text[start:end]}]]{text[end:]}"
        query = Query((asked,))
        return Example(query, self.wording.render(self.truth(record)))

    def display(self, record: Record) -> tuple[list[tuple[str, bool]], dict[str, str]]:
        text, start, end = record["text"], record["hint_start"], record["hint_end"]
        pieces = [(text[:start], False), (text[start:end], True), (text[end:], False)]
        about = {"answer with the hint": record["original"], "correct answer": record["correct"]}
        return pieces, {name: value for name, value in about.items() if value is not None}


def _text_and_span(item: Item, config: InputAblationConfig) -> tuple[str, tuple[int, int]]:
    """The prompt of an item, and the characters of it that are ablated."""
    if "span" in item:
        return item["text"], (item["span"][0], item["span"][1])
    text, span = question_text(item["question"], item["choices"], item["hinted"], config)
    assert span, "every question has a hint"
    return text, span


def _unsayable(target: Target, item: Item, config: InputAblationConfig) -> Record | None:
    """The failed record of an item with an answer that is no single token, so that the target could never give it."""
    if "span" in item:
        return None
    for answer in answers_of(item["choices"], config):
        # A next token usually brings the blank before it along.
        if all(single_token(target.tokenizer, text) is None for text in (f" {answer}", answer)):
            return failed(item, "answer_no_single_token", f"the answer {answer!r} is no single token of the target")
    return None


def _hinted(row: Mapping[str, Any], config: InputAblationConfig, seed: int) -> int:
    """Index of the hinted option: a stable draw per question, its options, and seed."""
    answer, count = int(row["answer"]), len(row["choices"])
    draw = int(stable_id("hint", seed, row["question"], list(row["choices"]), answer), 16)
    if config.policy == "correct":
        return answer
    if config.policy == "wrong":
        return (answer + 1 + draw % (count - 1)) % count
    return draw % count
