"""Serve configs that are embedded in manifests as text: what Serve would take without a word is refused here."""

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import (
    DeploymentSchema,
    HTTPOptionsSchema,
    LoggingConfig,
    RayActorOptionsSchema,
    ServeApplicationSchema,
    ServeDeploySchema,
)

from introspect_ray.config import ReplicaConfig, ServeConfig
from introspect_ray.serving.calls import EXPLAINERS, simulator_deployment, target_deployment


def serve_problems(text: str) -> list[str]:
    """Everything that is wrong with the text of a `serveConfigV2`; Serve's own schema accepts unknown keys."""
    content = yaml.safe_load(text)
    found = list(_unknown(content))
    if found:
        return found
    try:
        ServeDeploySchema.model_validate(content)
    except ValidationError as error:
        return [str(line["loc"]) + " " + line["msg"] for line in error.errors()]
    for application in content["applications"]:
        module, _, builder = application["import_path"].partition(":")
        if not callable(getattr(import_module(module), builder, None)):
            found.append(f"{application['import_path']} is not there")
    try:
        service_config(text)
    except ValidationError as error:
        found += [".".join(map(str, line["loc"])) + ": " + line["msg"] for line in error.errors()]
    return found


def service_config(text: str) -> ServeConfig:
    """What the application is built from."""
    (application,) = yaml.safe_load(text)["applications"]
    return ServeConfig.model_validate(application["args"])


def served_replicas(config: ServeConfig) -> dict[str, ReplicaConfig]:
    """By name of the deployment."""
    targets = {target_deployment(one.name): one.replicas for one in config.targets}
    simulators = {simulator_deployment(one.name): one.replicas for one in config.simulators}
    return {"Gateway": config.gateway, EXPLAINERS: config.explainer_replicas} | targets | simulators


def _unknown(content: Mapping[str, Any]) -> Iterator[str]:
    yield from _extra(content, ServeDeploySchema, "")
    yield from _extra(content.get("http_options", {}), HTTPOptionsSchema, "http_options.")
    yield from _extra(content.get("logging_config", {}), LoggingConfig, "logging_config.")
    for application in content.get("applications", []):
        yield from _extra(application, ServeApplicationSchema, "applications.")
        for deployment in application.get("deployments", []):
            yield from _extra(deployment, DeploymentSchema, "deployments.")
            yield from _extra(deployment.get("autoscaling_config") or {}, AutoscalingConfig, "autoscaling_config.")
            yield from _extra(deployment.get("ray_actor_options") or {}, RayActorOptionsSchema, "ray_actor_options.")


def _extra(content: Mapping[str, Any], schema: type[BaseModel], where: str) -> Iterator[str]:
    yield from (f"{where}{key} is not known to Serve" for key in content if key not in schema.model_fields)
