"""Task 1, feature description (P1, section 2.2): at layer l, what does this vector encode?

Training vectors are decoder rows of an SAE of the target; the answer is the latent's description. Descriptions come
with the source rows (an outside label, or the pocket lexicon), each with its score and all others that are acceptable.
Vectors of collect_vectors.py come without any: they are only asked about.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from introspect_ray.config import GenerateConfig
from introspect_ray.explainer.query import Query, Vector
from introspect_ray.features.coder import SparseCoder
from introspect_ray.features.sae import load_sae
from introspect_ray.interventions.target import Target
from introspect_ray.tasks.base import COMMON_FIELDS, OK, Answer, Example, Item, Plan, Record, SplitOf, failed, stable_id


class FeatureDescription:
    name: ClassVar[str] = "feature_description"
    metrics: ClassVar[tuple[str, ...]] = ("description_match", "exact_match", "parse_rate")
    has_vectors: ClassVar[bool] = True
    breakdowns: ClassVar[Mapping[str, str]] = {"Kind of description": "label_kind"}
    unshared: ClassVar[tuple[str, ...]] = ()
    selected_by: ClassVar[tuple[str, ...]] = ("description",)
    source_formats: ClassVar[tuple[str, ...]] = ("latent_labels", "vectors")

    def schema(self, width: int, config: GenerateConfig) -> pa.Schema:
        vector_type = pa.float16() if config.vector_dtype == "float16" else pa.float32()
        return pa.schema(
            [
                *COMMON_FIELDS,
                pa.field("question", pa.string()),
                pa.field("layer", pa.int32()),
                pa.field("latent", pa.int32()),
                pa.field("description", pa.string()),
                pa.field("label_kind", pa.string()),
                pa.field("accepted", pa.list_(pa.string())),
                pa.field("label_score", pa.float32()),
                pa.field("vector", pa.fixed_shape_tensor(vector_type, (width,))),
            ]
        )

    def plan(self, rows: Sequence[Mapping[str, Any]], config: GenerateConfig, split_of: SplitOf) -> Plan:
        """One item per described vector.

        A latent is its own group; activations (rows that bring their vector) only train: scores are about latents.
        Vectors without a description only evaluate."""
        plan = Plan(num_source_rows=len(rows))
        seen: set[str] = set()
        for row in rows:
            if "vector_id" in row:
                if row["vector_id"] in seen:
                    plan.rejected.append((row["row"], "duplicate_vector_id"))
                    continue
                seen.add(row["vector_id"])
                plan.items.append(_evaluation_item(row))
                continue
            if row["score"] is not None and row["score"] < config.feature_description.minimum_score:
                plan.rejected.append((row["row"], "label_score_too_low"))
                continue
            kind = "latent" if row["vector"] is None else "activation"
            # Not the path: the same SAE must give the same splits wherever it lies.
            group = stable_id(kind, row["layer"], row["index"])
            split = split_of(group) if kind == "latent" else "train"
            keys = ("layer", "index", "description", "kind", "accepted", "score", "vector")
            item = {key: row[key] for key in keys}
            item_id = stable_id(self.name, config.feature_description.sae, item)
            plan.items.append({"item_id": item_id, "split": split, "group": group, **item})
        return plan

    def generate(self, target: Target, items: Sequence[Item], config: GenerateConfig) -> list[Record]:
        """Decoder rows, or the vector that an item brings; no forward pass."""
        needs_sae = any(item["vector"] is None for item in items)
        sae = load_sae(config.feature_description.sae) if needs_sae else None
        question = config.feature_description.question
        return [self._record(item, sae, target.width, question) for item in items]

    def _record(self, item: Item, sae: SparseCoder | None, width: int, question: str) -> Record:
        """A latent that the SAE does not have, or a vector of another width, is a row with that reason."""
        vector = item["vector"]
        if vector is None:
            assert sae is not None, "the SAE is loaded for items without a vector"
            if item["layer"] != sae.layer or item["index"] >= sae.num_latents:
                found = f"layer {sae.layer} with {sae.num_latents} latents"
                return failed(item, "no_such_latent", f"layer {item['layer']} latent {item['index']}: {found}")
            vector = sae.feature_vectors[item["index"]].float().numpy()
        vector = np.asarray(vector, dtype=np.float32)
        if vector.shape != (width,):
            return failed(item, "vector_width", f"width {len(vector)}, the target's is {width}")
        return {
            "record_id": stable_id("record", item["item_id"]),
            "status": OK,
            "detail": None,
            **{key: item[key] for key in ("item_id", "split", "group", "layer", "description", "accepted")},
            "question": question.replace("{layer}", str(item["layer"])),
            "latent": None if item["vector"] is not None else item["index"],
            "label_kind": item["kind"],
            "label_score": item["score"],
            "vector": vector,
        }

    def select(self, records: pa.Table, config: GenerateConfig) -> list[str] | None:  # noqa: ARG002 - needs no setting
        """All that have a description to train on or to compare with; `None` if no record lacks one."""
        described = records.filter(pc.is_valid(records["description"]))
        return None if described.num_rows == records.num_rows else described["record_id"].to_pylist()

    def render(self, record: Record) -> Example:
        vector = Vector(np.asarray(record["vector"], dtype=np.float32), (int(record["layer"]),))
        before, after = record["question"].split("{vector}")
        return Example(Query((before, vector, after)), f" {record['description'] or ''}".rstrip())

    def truth(self, record: Record) -> Answer:
        return Answer(None, record["description"] or "")

    def accepted(self, record: Record) -> tuple[str, ...]:
        return tuple(record["accepted"])

    def parse(self, text: str) -> Answer | None:
        """Any text with a word in it is a description."""
        return Answer(None, text.strip()) if any(character.isalnum() for character in text) else None

    def display(self, record: Record) -> tuple[list[tuple[str, bool]], dict[str, str]]:
        layer = (f" at layer {record['layer']}", False)
        if record["latent"] is None:
            pieces = [(record["label_kind"], True), layer]
        else:
            pieces = [("latent ", False), (str(record["latent"]), True), layer]
        if record["description"] is None:
            return pieces, {"reference": "none"}
        return pieces, {
            "also right": "; ".join(record["accepted"]) or "nothing else",
            "score of the label": "none" if record["label_score"] is None else f"{record['label_score']:.2f}",
        }


def _evaluation_item(row: Mapping[str, Any]) -> Item:
    """An item without description, label or score; its id is the vector's, by which its exemplars are found."""
    kept = {key: row[key] for key in ("group", "layer", "kind", "vector")}
    nothing: dict[str, Any] = {"index": None, "description": None, "accepted": [], "score": None}
    return {"item_id": row["vector_id"], "split": "test", **kept, **nothing}
