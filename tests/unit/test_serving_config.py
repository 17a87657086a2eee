"""What a config may say, who may ask, and that the Serve config file has no key that nobody reads."""

import os
from pathlib import Path

import pytest
import yaml
from ray.serve.config import AutoscalingConfig, HTTPOptions
from ray.serve.schema import (
    DeploymentSchema,
    HTTPOptionsSchema,
    LoggingConfig,
    ServeApplicationSchema,
    ServeDeploySchema,
)
from serving_helpers import serve_config, untrained_explainer

from introspect_ray.config import AuthConfig, ReplicaConfig, ServeConfig, ServedExplainer, resolved
from introspect_ray.errors import UserError
from introspect_ray.serving import app
from introspect_ray.serving.auth import checked_digest, is_loopback, matches, read_token, token_digest
from introspect_ray.serving.run import CHEAPER_REQUESTS, _variables
from introspect_ray.serving.table import served_models, with_quickstart

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "sixteen-characters-at-least"


@pytest.fixture(scope="module")
def explainer(tmp_path_factory):
    place = tmp_path_factory.mktemp("quickstart")
    untrained_explainer(place / "explainers" / "feature_description")
    return place


def test_the_serve_config_file_has_known_keys_only(monkeypatch):
    tree = yaml.safe_load((ROOT / "cluster" / "serve.yaml").read_text())
    assert set(tree) <= set(ServeDeploySchema.model_fields)
    assert set(tree["http_options"]) <= set(HTTPOptionsSchema.model_fields)
    assert set(tree["logging_config"]) <= set(LoggingConfig.model_fields)
    (application,) = tree["applications"]
    assert set(application) <= set(ServeApplicationSchema.model_fields)
    ServeDeploySchema(**tree)
    monkeypatch.setenv("INTROSPECT_RAY_TOKEN", TOKEN)
    module, name = application["import_path"].split(":")
    assert getattr(__import__(module, fromlist=[name]), name) is app.build
    assert app.build(application["args"])  # our own config tree refuses unknown keys


def test_deployments_take_what_their_config_says():
    scaled = ReplicaConfig(min_replicas=1, max_replicas=3, num_gpus=0.5, max_queued=7, target_ongoing=4)
    made = app._deployment(object, "name", scaled, ServeConfig())
    assert made.ray_actor_options["num_gpus"] == 0.5
    assert made.max_queued_requests == 7
    scaling = made._deployment_config.autoscaling_config
    assert isinstance(scaling, AutoscalingConfig)
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (1, 3, 4)
    assert (
        app._deployment(object, "name", ReplicaConfig(min_replicas=2, max_replicas=2), ServeConfig()).num_replicas == 2
    )
    assert set(app._size(scaled)["autoscaling_config"]) <= set(AutoscalingConfig.model_fields)
    assert set(DeploymentSchema.model_fields) and set(HTTPOptions.model_fields)


def test_without_a_token_only_this_machine_may_ask():
    nothing = AuthConfig(token_variable="NO_SUCH_VARIABLE")
    assert checked_digest(nothing, "127.0.0.1") is None
    for host in ("0.0.0.0", "::", "192.168.1.1", "example.org", ""):
        with pytest.raises(UserError, match="there is no token"):
            checked_digest(nothing, host)
    assert [is_loopback(host) for host in ("localhost", "127.9.9.9", "[::1]", "127.0.0.1.evil.org")] == [
        True,
        True,
        True,
        False,
    ]
    with pytest.raises(UserError, match="there is no token"):
        app.build(resolved(ServeConfig(quickstart=None, auth=nothing)))


def test_tokens_come_from_a_file_or_the_environment(tmp_path):
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    assert read_token(AuthConfig(token_file=str(file)), {}) == TOKEN
    assert read_token(AuthConfig(), {"INTROSPECT_RAY_TOKEN": TOKEN}) == TOKEN
    assert read_token(AuthConfig(), {"INTROSPECT_RAY_TOKEN": " "}) is None
    for bad in ("short", "sixteen characters", "sechzehn-zeichen-ä"):
        with pytest.raises(UserError, match="holds no usable token") as caught:
            read_token(AuthConfig(), {"INTROSPECT_RAY_TOKEN": bad})
        assert bad not in str(caught.value)
    with pytest.raises(UserError, match="cannot be read"):
        read_token(AuthConfig(token_file=str(tmp_path / "nothing")), {})
    assert matches(f"bearer {TOKEN}", token_digest(TOKEN)) and not matches(TOKEN, token_digest(TOKEN))
    assert TOKEN not in str(resolved(ServeConfig()))


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"targets": [{"name": "../a"}]}, "pattern"),
        ({"targets": [{"name": "a"}, {"name": "a"}]}, "different names"),
        ({"explainers": [{"name": "e", "target": "nobody"}]}, "names target 'nobody'"),
        ({"gateway": {"min_replicas": 3, "max_replicas": 2}}, "min_replicas"),
        ({"explainers": [{"name": "e", "tasks": []}]}, "at least 1"),
        ({"targets": []}, "targets is empty"),
    ],
)
def test_configs_that_fit_nothing_are_refused(tree, message):
    with pytest.raises(ValueError, match=message):
        ServeConfig.model_validate(tree)
    with pytest.raises(UserError, match=message):
        app.build(tree)


def test_models_are_checked_without_their_weights(explainer):
    folder = str(explainer / "explainers" / "feature_description")
    config = serve_config(folder)
    listed = served_models(config)
    assert listed.targets[0].coders[0].num_latents == 1536 and listed.explainers[0].layers == [0, 1, 2, 3]
    assert listed.examples.patches and listed.examples.ablations and len(listed.examples.texts) == 8
    other = config.model_copy(
        update={"targets": ServeConfig().targets, "explainers": (ServedExplainer(folder=folder, target="target_b"),)}
    )
    with pytest.raises(UserError, match=r"4 layers of width 160; its target target_b has 6 of width 128"):
        served_models(other)
    missing = config.model_copy(update={"explainers": (ServedExplainer(folder=str(explainer)),)})
    with pytest.raises(UserError, match="not a finished explainer"):
        served_models(missing)


def test_finished_explainers_of_the_quickstart_are_served(explainer):
    config = with_quickstart(ServeConfig(quickstart=str(explainer)))
    (found,) = config.explainers
    assert (found.name, found.target, found.tasks) == ("feature_description", "target_a", ("feature_description",))
    assert config.quickstart is None
    assert with_quickstart(ServeConfig(quickstart=str(explainer / "nothing"))).explainers == ()


def test_variables_of_the_start_are_gone_after_it(monkeypatch):
    monkeypatch.setenv("SET_ALREADY", "mine")
    monkeypatch.delenv("NOT_YET", raising=False)
    with pytest.raises(ValueError, match="a start that fails"), _variables({"SET_ALREADY": "0", "NOT_YET": "1"}):
        assert (os.environ["SET_ALREADY"], os.environ["NOT_YET"]) == ("mine", "1")
        raise ValueError("a start that fails")
    assert os.environ["SET_ALREADY"] == "mine" and "NOT_YET" not in os.environ


def test_the_rayservice_has_the_variables_of_this_machine():
    content = yaml.safe_load((ROOT / "k8s" / "serving" / "rayservice.yaml").read_text())["spec"]["rayClusterConfig"]
    for group in (content["headGroupSpec"], *content["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        assert CHEAPER_REQUESTS.items() <= {one["name"]: one.get("value") for one in container["env"]}.items()
