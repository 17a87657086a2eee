"""Datasets in the layouts that P1 published (Transluce/act_patch_*, Transluce/input_ablation_*): written and read.

A published dataset is a folder of Parquet files whose names begin with their split: `train.parquet`,
`test-00000-of-00002.parquet`. Columns and types are those of the published files. Tokens of `input_tokens` and the two
continuations are the tokenizer's raw ones; `orig_pos` counts the begin-of-text token, which `input_tokens` leaves out.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from introspect_ray.config import ConvertConfig, GenerateConfig, SourceConfig, TaskName, resolved
from introspect_ray.data.dataset import open_dataset
from introspect_ray.data.identity import identify_target
from introspect_ray.data.manifest import (
    CONFIG_NAME,
    REJECTED_NAME,
    SCHEMA_VERSION,
    Manifest,
    SourceAccount,
    write_manifest,
)
from introspect_ray.data.pickles import TENSOR_SUFFIXES, archive_files, read_pickle, read_tensor_file
from introspect_ray.data.reading import read_rows
from introspect_ray.data.shards import ShardOrder, parquet_bytes, read_items, write_items, write_records
from introspect_ray.data.splits import SPLITS
from introspect_ray.data.storage import Folder
from introspect_ray.errors import UserError
from introspect_ray.models.loading import load_tokenizer
from introspect_ray.models.tokens import adds_bos, encode_with_offsets, single_token
from introspect_ray.tasks.base import OK, Item, Record, stable_id
from introspect_ray.tasks.registry import get_task

PATCH_POSITION = pa.struct(
    [
        ("orig_pos", pa.int64()),
        ("counterfact_pos", pa.int64()),
        ("orig_text_token", pa.string()),
        ("counterfact_text_token", pa.string()),
        ("intervention_vector", pa.list_(pa.float32())),
    ]
)
ACT_PATCH = pa.schema(
    [
        ("layer", pa.list_(pa.int32())),
        ("input_tokens", pa.list_(pa.string())),
        ("original_continuation", pa.list_(pa.string())),
        ("ablated_continuation", pa.list_(pa.string())),
        ("is_different", pa.bool_()),
        ("patch_position", PATCH_POSITION),
        ("counterfactual_text", pa.string()),
        ("gt_original_target", pa.string()),
        ("gt_counterfactual_target", pa.string()),
    ]
)
INPUT_ABLATION = pa.schema(
    [(name, pa.string()) for name in ("ablation_prompt", "original_prompt_full", "hint_prompt_full")]
    + [(name, pa.string()) for name in ("original_user_prompt", "hint_user_prompt", "system_prompt")]
    + [(name, pa.string()) for name in ("random_hint_prediction", "zeroshot_prediction", "hint")]
    + [("changed_pred_bc_hint", pa.bool_())]
)
LABELS = pa.schema(
    [
        ("layer", pa.int32()),
        ("index", pa.int64()),
        ("description", pa.string()),
        ("accepted", pa.list_(pa.string())),
        ("score", pa.float64()),
    ]
)
"""The columns of source format latent_labels, which generate_dataset.py reads."""

Row = Mapping[str, Any]
Outcome = tuple[Item, Record]


class Unreadable(Exception):
    """Why one row cannot be taken over, as a short name."""


# --- ours to theirs ---------------------------------------------------------------------------------------------


def to_published(config: ConvertConfig) -> str:
    """Write the selected records of a dataset in the published layout of its task; one line about what was written.

    A record that the layout cannot hold is counted with its reason. Raises UserError for a task without such a layout.
    """
    dataset = open_dataset(config.source)
    task = dataset.manifest.task
    if task not in _WRITERS:
        raise UserError(f"dataset {config.source} is of task {task}, expected {' or '.join(_WRITERS)}")
    schema, write = _WRITERS[task]
    tokenizer = load_tokenizer(config.target)
    items = {
        item["item_id"]: item
        for index in range(len(dataset.manifest.shards))
        for item in read_items(dataset.folder, ShardOrder(index, dataset.manifest.run_key))
    }
    folder = _new_folder(config.output)
    reasons: Counter[str] = Counter()
    written = 0
    for split in dataset.manifest.selected:
        rows = []
        for record in dataset.records(split):
            try:
                rows.append(write(tokenizer, items[record["item_id"]], record))
            except Unreadable as reason:
                reasons[str(reason)] += 1
        folder.write(f"{split}.parquet", parquet_bytes(pa.Table.from_pylist(rows, schema=schema)))
        written += len(rows)
    return f"wrote {config.output}: {written} rows in {len(dataset.manifest.selected)} splits{_listed(reasons)}"


def _patch_row(tokenizer: PreTrainedTokenizerBase, item: Item, record: Record) -> dict[str, Any]:
    ids, _ = encode_with_offsets(tokenizer, record["text"])
    others, _ = encode_with_offsets(tokenizer, record["other_text"])
    place = record["position"]
    # The prompts differ in their subject only, so that what follows a position has the same tokens in both.
    other_place = place + len(others) - len(ids)
    if other_place < 0 or others[other_place + 1 :] != ids[place + 1 :]:
        raise Unreadable("counterfactual_position_unknown")
    own = ids[1:] if adds_bos(tokenizer) else ids
    return {
        "layer": [int(layer) for layer in record["layers"]],
        "input_tokens": tokenizer.convert_ids_to_tokens(own),
        "original_continuation": [_raw_token(tokenizer, record["original"])],
        "ablated_continuation": [_raw_token(tokenizer, record["content"])],
        "is_different": record["changed"],
        "patch_position": {
            "orig_pos": place,
            "counterfact_pos": other_place,
            "orig_text_token": tokenizer.decode([ids[place]]),
            "counterfact_text_token": tokenizer.decode([others[other_place]]),
            "intervention_vector": record["vector"].tolist(),
        },
        "counterfactual_text": record["other_text"],
        "gt_original_target": item["answer"],
        "gt_counterfactual_target": item["other_answer"],
    }


def _raw_token(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The raw token that says `text` after other text, or on its own."""
    for spelling in (f" {text}", text):
        token = single_token(tokenizer, spelling)
        if token is not None:
            return str(tokenizer.convert_ids_to_tokens([token])[0])
    raise Unreadable("continuation_no_single_token")


def _ablation_row(_: PreTrainedTokenizerBase, item: Item, record: Record) -> dict[str, Any]:  # noqa: ARG001
    text, start, end = record["text"], record["hint_start"], record["hint_end"]
    plain = text[:start] + text[end:]
    return {
        "ablation_prompt": text,
        "original_prompt_full": plain,
        "hint_prompt_full": text,
        "original_user_prompt": plain,
        "hint_user_prompt": text,
        "system_prompt": "",
        "random_hint_prediction": record["original"],
        "zeroshot_prediction": record["content"],
        "hint": text[start:end].strip(),
        "changed_pred_bc_hint": record["changed"],
    }


Writer = Callable[[PreTrainedTokenizerBase, Item, Record], dict[str, Any]]
_WRITERS: dict[str, tuple[pa.Schema, Writer]] = {
    "activation_patching": (ACT_PATCH, _patch_row),
    "input_ablation": (INPUT_ABLATION, _ablation_row),
}


# --- theirs to ours ---------------------------------------------------------------------------------------------


def from_published(config: ConvertConfig) -> str:
    """Write a folder of published files as a dataset that training reads; one line about what was written.

    The target's tokenizer tells which characters a token stands for; no weights are read. Raises UserError for files
    that lack a column, and if no row can be taken over.
    """
    identity = identify_target(config.target)
    tokenizer = load_tokenizer(config.target)
    rows = [(split, row) for split, url in _split_files(config.source) for row in _checked_rows(url)]
    name: TaskName = "activation_patching" if "patch_position" in rows[0][1] else "input_ablation"
    task, read = get_task(name), _read_patch if name == "activation_patching" else _read_ablation
    generated = GenerateConfig(
        task=name,
        output=config.output,
        target=config.target,
        source=SourceConfig(path=config.source),
        vector_dtype=config.vector_dtype,
    )
    outcomes: dict[str, Outcome] = {}
    rejected: list[tuple[int, str]] = []
    for number, (split, row) in enumerate(rows):
        try:
            item, record = read(tokenizer, row, identity.width)
        except Unreadable as reason:
            rejected.append((number, str(reason)))
            continue
        if record["record_id"] in outcomes:
            rejected.append((number, "duplicate_row"))
            continue
        outcomes[record["record_id"]] = ({**item, "split": split}, {**record, "split": split})
    if not outcomes:
        raise UserError(
            f"source {config.source}: none of {len(rows)} rows can be taken over{_listed(_reasons(rejected))}"
        )
    folder = _new_folder(config.output)
    run_key = stable_id("published", sorted(outcomes), identity.model_dump())
    content = {"run_key": run_key, "inputs": {}, "config": resolved(generated)}
    folder.write(CONFIG_NAME, (json.dumps(content, indent=1) + "\n").encode())
    schema = task.schema(identity.width, generated)
    found = list(outcomes.values())
    shards = []
    for index, start in enumerate(range(0, len(found), config.records_per_shard)):
        part, order = found[start : start + config.records_per_shard], ShardOrder(index, run_key)
        write_items(folder, order, [item for item, _ in part])
        shards.append(write_records(folder, order, [record for _, record in part], schema))
    folder.write(
        REJECTED_NAME,
        "".join(json.dumps({"row": row, "reason": reason}) + "\n" for row, reason in rejected).encode(),
    )
    counts = Counter(record["split"] for _, record in found)
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        task=task.name,
        config=resolved(generated),
        run_key=run_key,
        target=identity,
        source=SourceAccount(
            name=config.source, format="published", rows=len(rows), used=len(found), rejected=_reasons(rejected)
        ),
        num_records=len(found),
        counts={split: {OK: count} for split, count in sorted(counts.items())},
        selected=dict(sorted(counts.items())),
        has_selection=False,
        shards=tuple(shards),
    )
    write_manifest(folder, manifest)
    return f"wrote {config.output}: {len(found)} records of {task.name}{_listed(_reasons(rejected))}"


def _split_files(url: str) -> list[tuple[str, str]]:
    """(split, URL) of every Parquet file whose name begins with a split; `train_full` holds `train` once more."""
    names = Folder(url).names()
    found = [(re.split(r"[-.]", name)[0], f"{url.rstrip('/')}/{name}") for name in names if name.endswith(".parquet")]
    chosen = [(split, path) for split, path in found if split in SPLITS]
    if not chosen:
        raise UserError(f"source {url} holds no file train*.parquet, validation*.parquet or test*.parquet")
    return chosen


def _checked_rows(url: str) -> list[dict[str, Any]]:
    rows = read_rows(url)
    schema = ACT_PATCH if "patch_position" in rows[0] else INPUT_ABLATION
    optional = {"ablation_prompt", "system_prompt", "original_user_prompt", "hint_user_prompt", "changed_pred_bc_hint"}
    for name in schema.names:
        if name not in rows[0] and name not in optional:
            raise UserError(f"source {url} has no column {name!r}; found are {', '.join(rows[0])}")
    return rows


def _read_patch(tokenizer: PreTrainedTokenizerBase, row: Row, width: int) -> Outcome:
    tokens = list(row["input_tokens"] or ())
    if tokens and tokens[0] == tokenizer.bos_token:
        tokens = tokens[1:]
    text = tokenizer.convert_tokens_to_string(tokens)
    ids, offsets = encode_with_offsets(tokenizer, text)
    where = row["patch_position"] or {}
    place, vector = where.get("orig_pos"), np.asarray(where.get("intervention_vector") or (), np.float32)
    if place is None or not 0 <= place < len(ids):
        raise Unreadable("position_out_of_range")
    spellings = (tokenizer.decode([ids[place]]), *tokenizer.convert_ids_to_tokens([ids[place]]))
    if where.get("orig_text_token") not in spellings:
        raise Unreadable("token_is_another")
    if vector.shape != (width,):
        raise Unreadable("vector_width")
    if not np.isfinite(vector).all():
        raise Unreadable("vector_not_finite")
    layers = np.atleast_1d(row["layer"]).tolist()
    content = {
        "text": text,
        "other_text": row["counterfactual_text"],
        "layers": layers,
        "position": place,
        "original": _said(tokenizer, row["original_continuation"]),
        "content": _said(tokenizer, row["ablated_continuation"]),
        "changed": bool(row["is_different"]),
    }
    answers = {"answer": row["gt_original_target"], "other_answer": row["gt_counterfactual_target"]}
    record = {
        **_identified(content, text, vector.tolist()),
        "block": layers[0] // len(layers),
        "kind": "unknown",
        "token_start": offsets[place][0],
        "token_end": offsets[place][1],
        "vector": vector,
    }
    return {**_item_keys(record), **answers}, record


def _said(tokenizer: PreTrainedTokenizerBase, tokens: Any) -> str:
    """What the raw tokens of a continuation say."""
    said = tokenizer.convert_tokens_to_string([tokens] if isinstance(tokens, str) else list(tokens or ())).strip()
    if not said:
        raise Unreadable("empty_continuation")
    return said


def _read_ablation(_: PreTrainedTokenizerBase, row: Row, __: int) -> Outcome:
    text, plain, hint = row["hint_prompt_full"], row["original_prompt_full"], row["hint"]
    answers = (row["random_hint_prediction"], row["zeroshot_prediction"])
    if not all(isinstance(value, str) and value.strip() for value in (text, plain, hint, *answers)):
        raise Unreadable("missing_value")
    # The span is what must go so that the plain prompt is left: the hint, with the blanks before it rather than after.
    length = len(text) - len(plain)
    begins = (place for place in range(len(text)) if text[:place] + text[place + length :] == plain)
    begin = next((place for place in begins if text[place : place + length].strip() == hint.strip()), None)
    if begin is None:
        raise Unreadable("hint_not_found")
    with_hint, without = (answer.strip() for answer in answers)
    content = {
        "text": text,
        "hint_start": begin,
        "hint_end": begin + length,
        "hint": hint.removeprefix("Hint:").strip(),
        "original": with_hint,
        "content": without,
        "changed": with_hint != without,
    }
    record = _identified(content, plain)
    return _item_keys(record), record


def _identified(content: dict[str, Any], group: str, *more: Any) -> Record:
    """A record with ids that follow from its content; records of one text are one group."""
    item_id = stable_id("published", content, *more)
    ids = {"record_id": stable_id("record", item_id), "item_id": item_id, "group": stable_id("text", group)}
    return {**ids, "status": OK, "detail": None, **content}


def _item_keys(record: Record) -> Item:
    return {name: record[name] for name in ("item_id", "group")}


# --- pickles ----------------------------------------------------------------------------------------------------


def convert_pickles(config: ConvertConfig) -> str:
    """Write published pickles (a file, or a tar of them) as safetensors and Parquet; one line about what was written.

    Tensors keep shape and dtype, under the key `tensor`; lists of explanations become rows of source format
    latent_labels. Raises UserError for a pickle that holds anything else, and runs none of what it asks for.
    """
    import safetensors.torch

    folder = _new_folder(config.output)
    written = passed = 0
    for name, content in archive_files(config.source):
        stem, _, suffix = name.rpartition(".")
        if ".." in name.split("/") or name.startswith("/"):
            raise UserError(f"source {config.source} holds a file named {name!r}, which lies outside of it")
        if f".{suffix}" not in TENSOR_SUFFIXES:
            passed += 1
            continue
        if stem.endswith("_explanations"):
            rows = _label_rows(name, read_pickle(name, content))
            folder.write(f"{stem}.parquet", parquet_bytes(pa.Table.from_pylist(rows, schema=LABELS)))
        elif stem.endswith("_idxs"):
            pairs = [{"layer": layer, "index": index} for layer, index in _pairs(name, read_pickle(name, content))]
            table = pa.Table.from_pylist(pairs, schema=pa.schema([LABELS.field("layer"), LABELS.field("index")]))
            folder.write(f"{stem}.parquet", parquet_bytes(table))
        else:
            tensor = read_tensor_file(name, content).contiguous()
            folder.write(f"{stem}.safetensors", safetensors.torch.save({"tensor": tensor}))
        written += 1
    if not written:
        raise UserError(f"source {config.source} holds no file that ends in {' or '.join(TENSOR_SUFFIXES)}")
    return f"wrote {config.output}: {written} files" + (f"; {passed} others passed over" if passed else "")


def _label_rows(name: str, entries: Any) -> list[dict[str, Any]]:
    """Rows of latent_labels; the score is the chosen label's own, null where it has none."""
    if not isinstance(entries, list):
        raise UserError(f"pickle {name} holds {type(entries).__name__}, expected a list of explanations")
    rows = []
    for number, entry in enumerate(entries):
        try:
            (layer, index), found = entry
            chosen, labels = found["chosen_label"], list(found["all_labels"])
            scores = found.get("all_label_scores") or {}
            rows.append(
                {
                    "layer": int(layer),
                    "index": int(index),
                    "description": chosen,
                    "accepted": [label for label in labels if label != chosen],
                    "score": scores.get(chosen),
                }
            )
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise UserError(
                f"pickle {name}, entry {number} is no explanation: {type(error).__name__} {error}"
            ) from None
    return rows


def _pairs(name: str, entries: Any) -> list[tuple[int, int]]:
    try:
        return [(int(layer), int(index)) for layer, index in entries]
    except (TypeError, ValueError) as error:
        raise UserError(f"pickle {name} holds no list of (layer, index): {error}") from None


# --- both -------------------------------------------------------------------------------------------------------


def _new_folder(url: str) -> Folder:
    """The output folder, which must be empty: nothing of another conversion may stay in it."""
    folder = Folder(url)
    if names := folder.names():
        raise UserError(f"output folder {url} is not empty ({names[0]}, ...): choose another folder")
    return folder


def _reasons(rejected: Iterable[tuple[int, str]]) -> dict[str, int]:
    return dict(sorted(Counter(reason for _, reason in rejected).items()))


def _listed(reasons: Mapping[str, int]) -> str:
    return "".join(f"; {count} rows left out: {reason}" for reason, count in sorted(reasons.items()))
