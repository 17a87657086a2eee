"""Ready configs: a model and a task choose P1's hyperparameters, and whatever is given goes over them."""

from typing import get_args

import pytest
import yaml

from introspect_ray.cli import parse
from introspect_ray.config import TaskName, TrainConfig
from introspect_ray.errors import UserError
from introspect_ray.presets import Train8BConfig, Train70BConfig


def read(config_class, *arguments):
    return parse(config_class, "A job.", arguments, switches={"plan": "plan.show"})


def test_hyperparameters_follow_the_task():
    features, patching, ablation = (read(Train8BConfig, "--task", task) for task in get_args(TaskName))
    assert [config.method for config in (features, patching, ablation)] == ["full", "lora", "full"]
    assert [config.optimization.batch_size for config in (features, patching, ablation)] == [64, 32, 8]
    assert [config.optimization.learning_rate for config in (features, patching, ablation)] == [5e-5, 5e-5, 1e-5]
    assert [config.optimization.epochs for config in (features, patching, ablation)] == [10, 20, 20]
    assert (patching.lora.rank, patching.lora.alpha, patching.lora.dropout) == (128, 16, 0.1)
    assert ablation.plan.target == "meta-llama/Llama-3.1-8B-Instruct"


def test_the_model_chooses_path_and_target():
    config = read(Train8BConfig, "--model", "qwen3-8b", "--task", "activation_patching")
    assert config.explainer.model.path == "Qwen/Qwen3-8B"
    assert config.datasets == ("runs/datasets/qwen3-8b/activation_patching",)
    assert config.plan.num_examples == 120_644
    cross = read(Train8BConfig, "--model", "qwen3-8b", "--target", "llama-3.1-8b")
    assert cross.plan.target == "meta-llama/Llama-3.1-8B" and cross.plan.num_examples is None
    large = read(Train70BConfig)
    assert (large.method, large.trainer.sharding, large.trainer.num_workers) == ("qlora", "fsdp2", 8)


def test_file_and_options_go_over_the_preset(tmp_path):
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump({"task": "input_ablation", "optimization": {"epochs": 3}, "method": "lora"}))
    config = read(Train8BConfig, "--config", str(file), "--optimization.batch_size", "5", "--plan")
    assert (config.optimization.epochs, config.optimization.batch_size) == (3, 5)
    assert (config.optimization.learning_rate, config.method, config.plan.show) == (5e-5, "lora", True)
    plain = config.training()
    assert type(plain) is TrainConfig and plain.optimization == config.optimization
    assert TrainConfig.model_validate(plain.model_dump(mode="json")) == plain


def test_what_depends_on_the_method_follows_the_one_that_is_given():
    full = read(Train8BConfig, "--task", "activation_patching", "--method", "full")
    assert (full.explainer.model.dtype, full.trainer.sharding, full.trainer.activation_checkpointing) == (
        *("float32", "fsdp2", True),
    )
    adapter = read(Train8BConfig, "--method", "lora")
    assert (adapter.explainer.model.dtype, adapter.trainer.sharding) == ("bfloat16", "none")


def test_steps_that_are_given_replace_the_presets_epochs():
    config = read(Train8BConfig, "--optimization.steps", "100")
    assert (config.optimization.steps, config.optimization.epochs) == (100, None)


@pytest.mark.parametrize(
    ("config_class", "arguments", "line"),
    [
        (Train8BConfig, ["--model", "llama-3.1-70b"], "config key 'model': input should be 'llama-3.1-8b', "),
        (Train8BConfig, ["--task", "poetry"], "config key 'task': input should be 'feature_description'"),
        (Train70BConfig, ["--target", "gpt2"], "config key 'target': input should be 'llama-3.1-8b'"),
        (Train70BConfig, ["--plan", "yes"], "argument 'yes' was not expected"),
        (TrainConfig, ["--plan.gpu", "abacus"], "config key 'plan.gpu': input should be 'A10G-24'"),
    ],
)
def test_wrong_names_are_one_line(config_class, arguments, line):
    with pytest.raises(UserError) as caught:
        read(config_class, *arguments)
    assert str(caught.value).startswith(line)
