"""Kubernetes documents against the schemas of their kinds, unknown fields refused."""

import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import yaml

SCHEMAS = Path(__file__).parent / "k8s" / "schemas"
KINDS_WITHOUT_SCHEMA = ("PodMonitor",)
Document = dict[str, Any]


def schema_problems(document: Document) -> list[str]:
    """What the API server would refuse, and what it would drop in silence."""
    kind = document["kind"]
    if kind in KINDS_WITHOUT_SCHEMA:
        return []
    validator = _validator(f"{document['apiVersion']}/{kind}")
    name = f"{kind} {document['metadata'].get('name')}"
    return [f"{name}: {error.json_path}: {error.message}" for error in validator.iter_errors(_without_nulls(document))]


@cache
def _validator(kind: str) -> jsonschema.Draft202012Validator:
    if kind.startswith("ray.io/"):
        plural = kind.rpartition("/")[2].lower() + "s"
        with gzip.open(SCHEMAS / f"ray.io_{plural}.yaml.gz") as stream:
            definition = yaml.load(stream, yaml.CSafeLoader)
        version = next(one for one in definition["spec"]["versions"] if one["name"] == kind.split("/")[1])
        schema = strict(version["schema"]["openAPIV3Schema"])
        schema["properties"]["metadata"] = {"type": "object"}
        return jsonschema.Draft202012Validator(schema)
    if kind.startswith("kueue.x-k8s.io/"):
        schema = json.loads((SCHEMAS / "kueue.json").read_text())
        assert kind in schema["kinds"], f"no schema for {kind}"
        return jsonschema.Draft202012Validator(strict(schema["kinds"][kind]) | {"definitions": schema["definitions"]})
    with gzip.open(SCHEMAS / "kubernetes-1.37.json.gz") as stream:
        found = json.load(stream)
    assert kind in found["kinds"], f"no schema for {kind}"
    return jsonschema.Draft202012Validator(found["kinds"][kind] | {"definitions": found["definitions"]})


def strict(schema: Any) -> Any:
    """A definition's schema with unknown fields refused, which the API server drops in silence.

    Fields with a default need not be there, and what may be a number or a text is either.
    """
    if not isinstance(schema, dict):
        return schema
    schema = dict(schema)
    properties = schema.get("properties")
    if isinstance(properties, dict):
        schema["properties"] = {name: strict(value) for name, value in properties.items()}
        required = schema.pop("required", [])
        schema["required"] = [name for name in required if "default" not in properties.get(name, {})]
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema.setdefault("additionalProperties", False)
    for inner in ("additionalProperties", "items"):
        if inner in schema:
            schema[inner] = strict(schema[inner])
    if schema.get("x-kubernetes-int-or-string"):
        schema.pop("type", None)
        schema.setdefault("anyOf", [{"type": "integer"}, {"type": "string"}])
    return schema


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
