"""The Serve application of a config: which deployments there are, and what each takes.

`serve deploy` and RayService call `build` with the config tree as its arguments; jobs/serve.py calls `application`.
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from ray import serve
from ray.serve import Application

from introspect_ray.config import ReplicaConfig, ServeConfig, resolved
from introspect_ray.config_file import problems
from introspect_ray.errors import UserError
from introspect_ray.serving import deployments
from introspect_ray.serving.api import Models
from introspect_ray.serving.auth import checked_digest
from introspect_ray.serving.calls import EXPLAINERS, simulator_deployment, target_deployment
from introspect_ray.serving.table import served_models, with_quickstart

ANYWHERE = "0.0.0.0"


def build(tree: dict[str, Any]) -> Application:
    """The application of a config tree, for `import_path: introspect_ray.serving.app:build`.

    The proxies of a cluster listen where its Serve config says, so a token is needed whatever `host` is.

    Raises UserError for a bad config, or if there is no token.
    """
    try:
        config = ServeConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError(problems(error, ServeConfig, None, ())) from None
    config = with_quickstart(config)
    return application(config, served_models(config), checked_digest(config.auth, ANYWHERE))


def application(config: ServeConfig, models: Models, digest: str | None) -> Application:
    """Gateway and deployments, bound together. `digest`: of the token that requests need."""
    tree = resolved(config)
    batching, limits = tree["batching"], tree["limits"]
    handles: dict[str, Any] = {}
    for target in config.targets:
        name = target_deployment(target.name)
        handles[name] = _deployment(deployments.TargetModel, name, target.replicas, config).bind(
            resolved(target), batching, limits
        )
    if config.explainers:
        explainers = _deployment(deployments.Explainer, EXPLAINERS, config.explainer_replicas, config)
        handles[EXPLAINERS] = explainers.bind(tree)
    targets = {target.name: resolved(target) for target in config.targets}
    for simulator in config.simulators:
        name = simulator_deployment(simulator.name)
        handles[name] = _deployment(deployments.Simulator, name, simulator.replicas, config).bind(
            resolved(simulator), targets[simulator.target], batching, limits
        )
    gateway = _deployment(serve.ingress()(deployments.Gateway), "Gateway", config.gateway, config)
    return gateway.bind(tree, models.model_dump(), digest, handles)


def _deployment(actor: type, name: str, replicas: ReplicaConfig, config: ServeConfig) -> serve.Deployment:
    """`actor` under a name, with what its config says about replicas."""
    return serve.deployment(
        name=name,
        ray_actor_options={"num_cpus": replicas.num_cpus, "num_gpus": replicas.num_gpus},
        max_ongoing_requests=replicas.max_ongoing,
        max_queued_requests=replicas.max_queued,
        backpressure_config={"status_code": 503, "retry_after_s": 1},
        max_constructor_retry_count=3,
        max_surge_percent=replicas.surge_percent,
        health_check_period_s=replicas.health_check_period_s,
        health_check_timeout_s=replicas.health_check_timeout_s,
        graceful_shutdown_timeout_s=config.limits.drain_s,
        graceful_shutdown_wait_loop_s=0.2,
        **_size(replicas),
    )(actor)


def _size(replicas: ReplicaConfig) -> dict[str, Any]:
    if replicas.min_replicas == replicas.max_replicas:
        return {"num_replicas": replicas.min_replicas}
    scaling = {
        "min_replicas": replicas.min_replicas,
        "initial_replicas": replicas.min_replicas,
        "max_replicas": replicas.max_replicas,
        "target_ongoing_requests": replicas.target_ongoing,
        "upscale_delay_s": replicas.upscale_delay_s,
        "downscale_delay_s": replicas.downscale_delay_s,
    }
    return {"autoscaling_config": scaling}
