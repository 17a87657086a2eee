"""A command line becomes one validated config, or one clear line and exit status 2."""

import pytest
import yaml

from introspect_ray.cli import SUBMITTED_VARIABLE, parse, progress_bar, run_job
from introspect_ray.config import EvaluateConfig, GenerateConfig, InspectConfig, QuickstartConfig, TrainConfig
from introspect_ray.errors import RunFailed, UserError


def read(config_class, *arguments):
    return parse(config_class, "A job.", arguments)


def write(tmp_path, text):
    path = tmp_path / "job.yaml"
    path.write_text(text)
    return str(path)


def test_the_command_line_wins_over_the_file_and_the_file_over_defaults(tmp_path):
    file = write(tmp_path, "seed: 5\nactors: {max_size: 3, num_cpus: 2}\nsource:\n  limit: 7\n")
    config = read(GenerateConfig, "--config", file, "--actors.max_size", "4", "--task", "input_ablation")
    assert (config.actors.max_size, config.actors.num_cpus, config.actors.min_size) == (4, 2, 1)
    assert (config.seed, config.source.limit, config.task) == (5, 7, "input_ablation")
    assert read(GenerateConfig, "--config", file, "--source.limit", "none").source.limit is None
    assert read(GenerateConfig) == GenerateConfig()
    assert read(GenerateConfig, "--config", write(tmp_path, "")) == GenerateConfig()


def test_a_section_given_in_part_keeps_its_own_defaults():
    default = QuickstartConfig().feature_description
    given = {"feature_description": {"explainer": {"max_new_tokens": 7}, "optimization": {"steps": 3}}}
    found = QuickstartConfig.model_validate(given).feature_description
    assert found.explainer == default.explainer.model_copy(update={"max_new_tokens": 7})
    assert found.optimization == default.optimization.model_copy(update={"steps": 3})
    assert found.fit_projection == default.fit_projection and default != type(default)()


def test_environment_is_not_configuration(monkeypatch):
    for name in ("SEED", "seed", "ACTORS__MAX_SIZE", "actors.max_size", "OUTPUT"):
        monkeypatch.setenv(name, "9")
    assert read(GenerateConfig) == GenerateConfig()


def test_lists_and_submodels_from_both_sides(tmp_path):
    file = write(tmp_path, "runs:\n- {dataset: a, explainer: b}\n- dataset: c\nmethods: [explainer, majority]\n")
    config = read(EvaluateConfig, "--config", file)
    assert [(run.dataset, run.explainer) for run in config.runs] == [("a", "b"), ("c", "runs/explainer")]
    assert config.methods == ("explainer", "majority")
    config = read(EvaluateConfig, "--runs", "{dataset: x}", "{dataset: y, explainer: z}", "--scales", "[1, 2.5]")
    assert [(run.dataset, run.explainer) for run in config.runs] == [("x", "runs/explainer"), ("y", "z")]
    assert config.scales == (1, 2.5)
    config = read(TrainConfig, "--datasets", "runs/1", "2", "--optimization.learning_rate", "1e-3")
    assert config.datasets == ("runs/1", "2")
    assert config.optimization.learning_rate == 0.001


def test_text_stays_text():
    config = read(GenerateConfig, "--output", "123", "--split.salt", "true", "--input_ablation.hint", " [{letter}]: x")
    assert (config.output, config.split.salt, config.input_ablation.hint) == ("123", "true", " [{letter}]: x")
    assert read(GenerateConfig, "--target.trust_remote_code", "true").target.trust_remote_code is True
    assert read(GenerateConfig, "--output=a=b", "--seed=-3").seed == -3


WRONG = [
    (["--sed", "3"], "config key 'sed' is not known; did you mean 'seed'?"),
    (["--actor.max_size", "3"], "config key 'actor.max_size' is not known; did you mean 'actors.max_size'?"),
    (["--max_size", "3"], "config key 'max_size' is not known; did you mean 'actors.max_size'?"),
    (["--zzz=3"], "config key 'zzz' is not known; known are task, output,"),
    (["--actors", "3"], "config key 'actors' is a section; set one of actors.min_size,"),
    (["out"], "argument 'out' was not expected"),
    (["--seed"], "argument --seed: expected one argument"),
    (
        ["--seed", "x"],
        "config key 'seed': input should be a valid integer, unable to parse string as an integer, found 'x'",
    ),
    (["--seed", "[1"], "config key 'seed': '[1' cannot be read"),
    (["--actors.max_size", "0"], "config key 'actors.max_size': input should be greater than or equal to 1, found 0"),
    (["--split.train", "0.9"], "config key 'split': train + validation + test must be 1, found 1.2"),
    (["--task", "patching"], "config key 'task': input should be 'feature_description', 'activation_patching' or"),
    (
        ["--activation_patching.instruction", "Answer:"],
        "config key 'activation_patching.instruction': needs {options} exactly once, found 0 in 'Answer:'",
    ),
    (
        ["--input_ablation.question", "{question} {options} {hint} {hint}"],
        "config key 'input_ablation.question': needs {hint} exactly once, found 2 in",
    ),
    (["--input_ablation.hint", ""], "config key 'input_ablation.hint':"),
    (["--config", "no.yaml"], "config file no.yaml does not exist"),
]


@pytest.mark.parametrize(("arguments", "line"), WRONG, ids=[" ".join(arguments) for arguments, _ in WRONG])
def test_a_wrong_argument_is_one_clear_line(arguments, line, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_job(GenerateConfig, lambda _: pytest.fail("the job started"), "A job.", arguments)
    written = capsys.readouterr()
    assert stopped.value.code == 2
    assert written.err.startswith(f"error: {line}") and written.err.count("\n") == 1 and written.out == ""


WRONG_FILES = [
    ("optimisation: 3", "config key 'optimisation' in FILE is not known; known are task,"),
    ("actors: {max_sise: 3}", "config key 'actors.max_sise' in FILE is not known; did you mean 'actors.max_size'?"),
    (
        "actors: 3",
        "config key 'actors' in FILE: input should be a valid dictionary or instance of ActorConfig, found 3",
    ),
    ("seed: 1\nseed: 2", "config file FILE is not valid YAML: key 'seed' is given twice at line 1, column 1"),
    ("seed: [1", "config file FILE is not valid YAML: expected ',' or ']'"),
    ("- seed", "config file FILE must hold a mapping of keys, found list"),
    ("a\tb: *c", "config file FILE is not valid YAML:"),
]


@pytest.mark.parametrize(("text", "line"), WRONG_FILES)
def test_a_wrong_file_is_one_clear_line(tmp_path, text, line):
    file = write(tmp_path, text)
    with pytest.raises(UserError) as caught:
        read(GenerateConfig, "--config", file)
    assert str(caught.value).startswith(line.replace("FILE", file))


def test_a_wrong_value_says_which_side_it_came_from(tmp_path):
    file = write(tmp_path, "seed: x\nitems_per_shard: 0")
    with pytest.raises(UserError) as caught:
        read(GenerateConfig, "--config", file, "--seed", "y")
    line = str(caught.value)
    assert f"config key 'items_per_shard' in {file}: " in line and "config key 'seed': " in line
    with pytest.raises(UserError, match=r"'runs.1.explaner' .* did you mean 'runs.1.explainer'"):
        read(EvaluateConfig, "--runs", "{}", "{explaner: a}")


def test_help_explains_every_field_with_its_default(capsys):
    with pytest.raises(SystemExit) as stopped:
        read(GenerateConfig, "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    assert "Work items (prompt pairs, questions, latents) per shard" in text and "[default: 256]" in text
    assert "--source.limit int|none" in text and "Use at most so many source rows" in text
    for name, field in GenerateConfig.model_fields.items():
        assert name in text
        assert " ".join((field.description or "").split()) in text


@pytest.mark.parametrize(
    ("raised", "status", "line"),
    [
        (UserError("bad\ninput"), 2, "error: bad input\n"),
        (RunFailed("half done"), 1, "failed: half done\n"),
        (KeyboardInterrupt(), 130, "interrupted; the same command continues\n"),
        (None, 0, ""),
    ],
)
def test_exit_status(raised, status, line, capsys):
    def main(_):
        if raised is not None:
            raise raised

    with pytest.raises(SystemExit) as stopped:
        run_job(GenerateConfig, main, "A job.", ["--seed", "3"])
    written = capsys.readouterr()
    assert (stopped.value.code, written.err) == (status, line)
    assert GenerateConfig.model_validate(yaml.safe_load(written.out)) == GenerateConfig(seed=3)


def test_a_defect_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_job(GenerateConfig, lambda _: 1 / 0, "A job.", [])


def test_progress_bar_counts_earlier_work_as_done_but_not_as_speed(capsys):
    with progress_bar("generate", "item") as show:
        show(40, 100, "0 records")
        show(100, 100, "60 records")
    last = capsys.readouterr().err.split("\r")[-1]
    assert "100/100" in last and "60 records" in last
    with progress_bar("generate", "item"):
        pass
    assert capsys.readouterr().err == ""


def test_one_key_may_stand_without_its_option():
    def dataset(*arguments):
        return parse(InspectConfig, "A job.", arguments, "dataset").dataset

    assert dataset("here") == dataset("--dataset", "here") == dataset("here", "--num_examples", "3") == "here"
    assert dataset("--num_examples", "3") == InspectConfig().dataset
    with pytest.raises(UserError, match="argument 'there' was not expected"):
        dataset("here", "there")


def test_a_key_that_stands_alone_wins_over_the_file(tmp_path):
    file = write(tmp_path, "dataset: there\n")
    assert parse(InspectConfig, "A job.", ["--config", file], "dataset").dataset == "there"
    assert parse(InspectConfig, "A job.", ["here", "--config", file], "dataset").dataset == "here"


def test_progress_without_a_terminal_is_lines(capsys, monkeypatch):
    monkeypatch.setattr("introspect_ray.cli.LINES_EVERY_S", 0.0)
    with progress_bar("generate", "item") as show:
        show(0, 100, "0 records")
        show(40, 100, "12 records")
        show(100, 100, "60 records")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" [")[0] for line in lines] == [
        "generate:   0% 0/100",
        "generate:  40% 40/100",
        "generate: 100% 100/100",
        "generate: 100% 100/100",
    ]
    assert "item/s, 12 records]" in lines[1]
    assert not any("\r" in line or line != line.strip() for line in lines)


def test_bars_side_by_side_without_a_terminal_are_lines_too(capsys, monkeypatch):
    monkeypatch.setattr("introspect_ray.cli.LINES_EVERY_S", 0.0)
    with progress_bar("outer", "step") as outer, progress_bar("inner", "step") as inner:
        for done in (0, 1, 2):
            outer(done, 2, "")
            inner(done, 2, "")
    said = capsys.readouterr().err
    assert "\x1b" not in said
    assert all(line.startswith(("outer: ", "inner: ")) for line in said.splitlines())


@pytest.mark.parametrize("output", ["s3://bucket/facts", "/shared/facts", "~/facts"])
def test_a_submitted_job_writes_where_it_stays(output, monkeypatch):
    monkeypatch.setenv(SUBMITTED_VARIABLE, "{}")
    with pytest.raises(SystemExit) as stopped:
        run_job(GenerateConfig, lambda _: None, "A job.", ["--output", output])
    assert stopped.value.code == 0


def test_a_submitted_job_may_not_write_into_the_copy_that_it_runs_in(capsys, monkeypatch):
    with pytest.raises(SystemExit) as stopped:
        run_job(GenerateConfig, lambda _: None, "A job.", ["--output", "runs/facts"])
    assert stopped.value.code == 0
    monkeypatch.setenv(SUBMITTED_VARIABLE, "{}")
    with pytest.raises(SystemExit) as stopped:
        run_job(GenerateConfig, lambda _: pytest.fail("it ran"), "A job.", ["--output", "runs/facts"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: output is 'runs/facts', which a submitted job would write")
