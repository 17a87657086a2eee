"""Datasets in the layouts that P1 published (Transluce/act_patch_*, Transluce/input_ablation_*): written and read.

A published dataset is a folder of Parquet files whose names begin with their split: `train.parquet`,
`test-00000-of-00002.parquet`. Columns and types are those of the published files. Tokens of `input_tokens` and the two
continuations are the tokenizer's raw ones; `orig_pos` counts the begin-of-text token, which `input_tokens` leaves out.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from introspect_ray.config import ConvertConfig, GenerateConfig, SourceConfig, TaskName, resolved
from introspect_ray.data.dataset import Dataset, float32_records, open_dataset
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
from introspect_ray.data.reading import open_parquet
from introspect_ray.data.shards import ShardInfo, ShardOrder, parquet_bytes, read_items, write_items, write_records
from introspect_ray.data.splits import SPLITS
from introspect_ray.data.storage import Folder, new_folder, storage_errors
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

VECTOR = "intervention_vector"
ROWS_AT_ONCE = 256
"""Rows that are plain Python objects at once."""

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
    with new_folder(config.output) as folder:
        files = {
            split: _SplitFiles(folder, split, schema, count, config.records_per_shard)
            for split, count in dataset.manifest.selected.items()
        }
        for index, table in enumerate(dataset.tables(None)):
            items = _items(dataset, index)
            for start in range(0, table.num_rows, ROWS_AT_ONCE):
                for record in float32_records(table.slice(start, ROWS_AT_ONCE)):
                    row: dict[str, Any] | str
                    try:
                        row = write(tokenizer, items[record["item_id"]], record)
                    except Unreadable as reason:
                        row = str(reason)
                    files[record["split"]].add(row)
    written, reasons = 0, Counter[str]()
    for of_split in files.values():
        written += of_split.num_written
        reasons += of_split.reasons
    return f"wrote {config.output}: {written} rows in {len(files)} splits{_listed(reasons)}"


class _SplitFiles:
    """The files of one split, each written when it is full; of their rows only one file's are in memory."""

    def __init__(self, folder: Folder, split: str, schema: pa.Schema, num_records: int, size: int):
        self.num_written = 0
        self.reasons: Counter[str] = Counter()
        self._folder, self._split, self._schema = folder, split, schema
        self._num_records, self._size = num_records, size
        self._num_seen = 0
        self._rows: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any] | str) -> None:
        """A row, or why a record has none."""
        self._num_seen += 1
        if isinstance(row, str):
            self.reasons[row] += 1
        else:
            self._rows.append(row)
        if self._num_seen % self._size and self._num_seen < self._num_records:
            return
        table = pa.Table.from_pylist(self._rows, schema=self._schema)
        self._folder.write(self._name(), parquet_bytes(table))
        self.num_written += len(self._rows)
        self._rows = []

    def _name(self) -> str:
        """As published: one file has the split's name, several are numbered."""
        number, total = -(-self._num_seen // self._size) - 1, -(-self._num_records // self._size)
        return f"{self._split}.parquet" if total == 1 else f"{self._split}-{number:05d}-of-{total:05d}.parquet"


def _items(dataset: Dataset, index: int) -> dict[str, Item]:
    """The work items of one shard by id."""
    order = ShardOrder(index, dataset.manifest.run_key)
    try:
        return {item["item_id"]: item for item in read_items(dataset.folder, order)}
    except FileNotFoundError:
        raise UserError(f"dataset {dataset.folder.url} lacks {order.plan_name}, which its work items are in") from None


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
            VECTOR: record["vector"],
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
    that lack a column, and if no row can be taken over; then the output folder is left empty.
    """
    identity = identify_target(config.target)
    tokenizer = load_tokenizer(config.target)
    files = _split_files(config.source)
    name, num_rows = _survey(config.source, files)
    task, read = get_task(name), _read_patch if name == "activation_patching" else _read_ablation
    generated = GenerateConfig(
        task=name,
        output=config.output,
        target=config.target,
        source=SourceConfig(path=config.source),
        vector_dtype=config.vector_dtype,
    )
    digests = [(split, url.rpartition("/")[2], _file_digest(url)) for split, url in files]
    run_key = stable_id("published", digests, identity.model_dump(), config.vector_dtype, config.records_per_shard)
    schema = task.schema(identity.width, generated)
    counts: Counter[str] = Counter()
    rejected: list[tuple[int, str]] = []
    with new_folder(config.output) as folder:
        content = {"run_key": run_key, "inputs": {}, "config": resolved(generated)}
        folder.write(CONFIG_NAME, (json.dumps(content, indent=1) + "\n").encode())
        shards = _Shards(folder, run_key, schema, config.records_per_shard)
        seen: set[int] = set()
        rows = ((split, row) for split, url in files for row in _rows(url))
        for number, (split, row) in enumerate(rows):
            try:
                item, record = read(tokenizer, row, schema)
            except Unreadable as reason:
                rejected.append((number, str(reason)))
                continue
            record_id = int(record["record_id"], 16)
            if record_id in seen:
                rejected.append((number, "duplicate_row"))
                continue
            seen.add(record_id)
            counts[split] += 1
            shards.add({**item, "split": split}, {**record, "split": split})
        if not seen:
            raise UserError(
                f"source {config.source}: none of {num_rows} rows can be taken over{_listed(_reasons(rejected))}"
            )
        shards.flush()
        folder.write(
            REJECTED_NAME,
            "".join(json.dumps({"row": row, "reason": reason}) + "\n" for row, reason in rejected).encode(),
        )
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            task=task.name,
            config=resolved(generated),
            run_key=run_key,
            target=identity,
            source=SourceAccount(
                name=config.source, format="published", rows=num_rows, used=len(seen), rejected=_reasons(rejected)
            ),
            num_records=len(seen),
            counts={split: {OK: count} for split, count in sorted(counts.items())},
            selected=dict(sorted(counts.items())),
            has_selection=False,
            shards=tuple(shards.written),
        )
        write_manifest(folder, manifest)
    return f"wrote {config.output}: {len(seen)} records of {task.name}{_listed(_reasons(rejected))}"


@dataclass
class _Shards:
    """Shards of a dataset, each written when it is full; of their records only one shard's are in memory."""

    folder: Folder
    run_key: str
    schema: pa.Schema
    size: int
    written: list[ShardInfo] = field(default_factory=list)
    waiting: list[Outcome] = field(default_factory=list)

    def add(self, item: Item, record: Record) -> None:
        self.waiting.append((item, record))
        if len(self.waiting) == self.size:
            self.flush()

    def flush(self) -> None:
        """Write what is waiting, if anything is."""
        if not self.waiting:
            return
        order = ShardOrder(len(self.written), self.run_key)
        write_items(self.folder, order, [item for item, _ in self.waiting])
        self.written.append(write_records(self.folder, order, [record for _, record in self.waiting], self.schema))
        self.waiting = []


def _split_files(url: str) -> list[tuple[str, str]]:
    """(split, URL) of every Parquet file whose name begins with a split; `train_full` holds `train` once more."""
    names = Folder(url).names()
    found = [(re.split(r"[-.]", name)[0], f"{url.rstrip('/')}/{name}") for name in names if name.endswith(".parquet")]
    chosen = [(split, path) for split, path in found if split in SPLITS]
    if not chosen:
        raise UserError(f"source {url} holds no file train*.parquet, validation*.parquet or test*.parquet")
    return chosen


def _survey(source: str, files: Sequence[tuple[str, str]]) -> tuple[TaskName, int]:
    """The task that all files are of, and their rows, told from their footers. Raises UserError for another layout."""
    tasks: set[TaskName] = set()
    num_rows = 0
    for _, url in files:
        with open_parquet(url) as file:
            tasks.add(_task_of(url, file.schema_arrow))
            num_rows += file.metadata.num_rows
    if len(tasks) > 1:
        raise UserError(f"source {source} holds files of {' and of '.join(sorted(tasks))}, expected one task")
    if not num_rows:
        raise UserError(f"source {source} holds no rows, expected at least one")
    return tasks.pop(), num_rows


def _task_of(url: str, found: pa.Schema) -> TaskName:
    is_patch = "patch_position" in found.names
    optional = {"ablation_prompt", "system_prompt", "original_user_prompt", "hint_user_prompt", "changed_pred_bc_hint"}
    for name in (ACT_PATCH if is_patch else INPUT_ABLATION).names:
        if name not in found.names and name not in optional:
            raise UserError(f"source {url} has no column {name!r}; found are {', '.join(found.names)}")
    if not is_patch:
        return "input_ablation"
    position = found.field("patch_position").type
    if not (pa.types.is_struct(position) and _is_vector(position, position.get_field_index(VECTOR))):
        raise UserError(
            f"source {url}: column 'patch_position' is {position}, expected a struct with a list of numbers {VECTOR!r}"
        )
    return "activation_patching"


def _is_vector(struct: pa.StructType, index: int) -> bool:
    """Whether the struct has a field of this index, and it is a list of numbers."""
    if index < 0:
        return False
    kind = struct.field(index).type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return is_list and (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type))


def _file_digest(url: str) -> str:
    """32 hex digits over the content, read piece by piece."""
    digest = hashlib.blake2b(digest_size=16)
    with storage_errors(f"source {url} cannot be read"), fsspec.open(url, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _rows(url: str) -> Iterator[Row]:
    """Rows of a published file, few of them in memory at once; vectors are numpy arrays, or None."""
    with open_parquet(url) as file:
        for batch in file.iter_batches(batch_size=ROWS_AT_ONCE):
            if "patch_position" not in batch.schema.names:
                yield from batch.to_pylist()
                continue
            # As Python floats a vector would take eight times as much memory.
            positions = batch.column("patch_position")
            others = [name.name for name in positions.type if name.name != VECTOR]
            plain = batch.drop_columns(["patch_position"]).to_pylist()
            vectors = pc.struct_field(positions, VECTOR)
            fields = {name: pc.struct_field(positions, name).to_pylist() for name in others}
            for index, row in enumerate(plain):
                values = vectors[index].values
                vector = None if values is None else values.to_numpy(zero_copy_only=False)
                yield {
                    **row,
                    "patch_position": {name: found[index] for name, found in fields.items()} | {VECTOR: vector},
                }


def _read_patch(tokenizer: PreTrainedTokenizerBase, row: Row, schema: pa.Schema) -> Outcome:
    tokens = list(row["input_tokens"] or ())
    if tokens and tokens[0] == tokenizer.bos_token:
        tokens = tokens[1:]
    text = tokenizer.convert_tokens_to_string(tokens)
    ids, offsets = encode_with_offsets(tokenizer, text)
    where, kind = row["patch_position"], schema.field("vector").type
    place = where.get("orig_pos")
    if place is None or not 0 <= place < len(ids):
        raise Unreadable("position_out_of_range")
    spellings = (tokenizer.decode([ids[place]]), *tokenizer.convert_ids_to_tokens([ids[place]]))
    if where.get("orig_text_token") not in spellings:
        raise Unreadable("token_is_another")
    if np.shape(where[VECTOR]) != tuple(kind.shape):
        raise Unreadable("vector_width")
    vector = where[VECTOR].astype("<f4")
    with np.errstate(over="ignore"):
        stored = vector.astype(kind.value_type.to_pandas_dtype())
    if not np.isfinite(stored).all():
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
        **_identified(content, text, hashlib.blake2b(vector.tobytes(), digest_size=16).hexdigest()),
        "block": layers[0] // len(layers),
        "kind": "unknown",
        "token_start": offsets[place][0],
        "token_end": offsets[place][1],
        "vector": stored,
    }
    return {**_item_keys(record), **answers}, record


def _said(tokenizer: PreTrainedTokenizerBase, tokens: Any) -> str:
    """What the raw tokens of a continuation say."""
    said = tokenizer.convert_tokens_to_string([tokens] if isinstance(tokens, str) else list(tokens or ())).strip()
    if not said:
        raise Unreadable("empty_continuation")
    return said


def _read_ablation(_: PreTrainedTokenizerBase, row: Row, __: pa.Schema) -> Outcome:
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

    written = passed = 0
    with new_folder(config.output) as folder:
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


def _reasons(rejected: Iterable[tuple[int, str]]) -> dict[str, int]:
    return dict(sorted(Counter(reason for _, reason in rejected).items()))


def _listed(reasons: Mapping[str, int]) -> str:
    return "".join(f"; {count} rows left out: {reason}" for reason, count in sorted(reasons.items()))
