"""Evaluating explainers: answers on Ray actors, kept on disk as they come, then scores and the report.

run (dataset, explainer) -> test records -> every method's answers (answers/TASK/METHOD.json, skipped if there)
    -> scores.json, report.html
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from introspect_ray.config import ActorConfig, EvaluateConfig, EvaluationRun, resolved
from introspect_ray.data.chat_pool import chat_model, check_chat
from introspect_ray.data.cluster import connect
from introspect_ray.data.dataset import Dataset, open_dataset
from introspect_ray.data.generate import check_resources
from introspect_ray.data.identity import folder_digest
from introspect_ray.data.journal import open_journal
from introspect_ray.data.manifest import CONFIG_NAME
from introspect_ray.data.storage import Folder
from introspect_ray.errors import UserError
from introspect_ray.evaluation.evaluate import Keep, TaskEvaluation, applicable, evaluate_task
from introspect_ray.evaluation.intervals import Bootstrap
from introspect_ray.evaluation.judge import Judge
from introspect_ray.evaluation.judged import JUDGED_TASK, with_judgements
from introspect_ray.evaluation.report import Report, TaskReport, build_task_report, render_report
from introspect_ray.evaluation.sampling import spread
from introspect_ray.evaluation.scores import format_table, scores_json
from introspect_ray.explainer.card import ExplainerCard, local_copy, read_card
from introspect_ray.tasks.base import Record, Task, stable_id
from introspect_ray.tasks.registry import get_task
from introspect_ray.training.answering import AnswerPool
from introspect_ray.training.held_out import seen_in_training
from introspect_ray.training.metrics import read_metrics

SCORES_NAME = "scores.json"
REPORT_NAME = "report.html"

logger = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]
"""(answers that came, answers in all, task); answers that an earlier run left count as come."""


@dataclass(frozen=True)
class EvaluationSummary:
    """What an evaluation wrote: the table for the terminal, and where scores and report are."""

    table: str
    scores: str
    report: str

    @property
    def text(self) -> str:
        return f"{self.table}\n\nwrote {self.scores} and {self.report}"


@dataclass(frozen=True)
class _Job:
    """One run of the config, checked."""

    run: EvaluationRun
    dataset: Dataset
    task: Task
    card: ExplainerCard


def evaluate_explainer(config: EvaluateConfig, progress: Progress) -> EvaluationSummary:
    """Answer, score and report every run of the config; answers that an earlier call left are used.

    Raises UserError, before a model loads, for runs that do not fit together or an output folder of another config.
    """
    all_jobs = [_check(run) for run in config.runs]
    contests = _contests(all_jobs)
    jobs = [contest[0] for contest in contests]
    tests = [spread(job.dataset.records("test"), config.max_examples) for job in jobs]
    if config.judge is not None:
        check_chat(config.judge.chat)
    folder = Folder(config.output)
    _claim(folder, config, all_jobs)
    cautions = [line for job in all_jobs if (line := seen_in_training(job.run.explainer, job.dataset)) is not None]
    for line in cautions:
        logger.warning(line)
    tally = _Tally(
        sum(
            len(test) * (_num_texts(contest[0].task, config) + len(contest) - 1 + _num_judged(contest, config))
            for contest, test in zip(contests, tests, strict=True)
        ),
        progress,
    )
    with connect():
        check_resources(config.actors)
        evaluated = [
            _evaluate(contest, test, config, folder, tally) for contest, test in zip(contests, tests, strict=True)
        ]
    evaluations = [evaluation for evaluation, _ in evaluated]
    report = Report(
        title="Can the model explain its own computations?",
        created=jobs[0].dataset.manifest.target.path,
        summary=[*_summary(config, contests, evaluations), *(("Caution", line) for line in cautions)],
        tasks=[task_report for _, task_report in evaluated],
    )
    folder.write(REPORT_NAME, render_report(report).encode())
    folder.write(SCORES_NAME, scores_json(evaluations).encode())
    return EvaluationSummary(
        format_table(evaluations), f"{config.output}/{SCORES_NAME}", f"{config.output}/{REPORT_NAME}"
    )


def _contests(jobs: Sequence[_Job]) -> list[list[_Job]]:
    """The jobs of each dataset, in order; of every task there may be one dataset."""
    contests: dict[str, list[_Job]] = {}
    for job in jobs:
        contests.setdefault(job.run.dataset, []).append(job)
    names = [contest[0].task.name for contest in contests.values()]
    if len(set(names)) < len(names):
        raise UserError(
            f"runs name datasets of the tasks {', '.join(names)}: expected one dataset of every task,"
            " which may have several explainers"
        )
    return list(contests.values())


def _check(run: EvaluationRun) -> _Job:
    dataset, card = open_dataset(run.dataset), read_card(run.explainer)
    target = dataset.manifest.target
    if (card.target.path, card.target.width, card.target.num_layers) != (target.path, target.width, target.num_layers):
        explained = f"{card.target.path} (width {card.target.width}, {card.target.num_layers} layers)"
        about = f"{target.path} (width {target.width}, {target.num_layers} layers)"
        raise UserError(f"explainer {run.explainer} explains {explained}, dataset {run.dataset} is about {about}")
    return _Job(run, dataset, get_task(dataset.manifest.task), card)


def _claim(folder: Folder, config: EvaluateConfig, jobs: Sequence[_Job]) -> None:
    """Write config.json into a new output folder; refuse one that holds another evaluation."""
    relevant = config.model_copy(update={"actors": ActorConfig(), "output": "", "num_browsable": 0})
    contents = [
        ([shard.digest for shard in job.dataset.manifest.shards], _explainer_digest(job.run.explainer)) for job in jobs
    ]
    key = stable_id(resolved(relevant), contents)
    try:
        found = json.loads(folder.read(CONFIG_NAME))
    except FileNotFoundError:
        content = {"key": key, "config": resolved(config), "tasks": [job.task.name for job in jobs]}
        folder.write(CONFIG_NAME, (json.dumps(content, indent=1) + "\n").encode())
        return
    except ValueError:
        found = {}
    if found.get("key") != key:
        raise UserError(
            f"output folder {config.output} belongs to another evaluation: choose another folder or delete it"
        )


def _explainer_digest(folder: str) -> str:
    with local_copy(folder) as path:
        return folder_digest(path)


@dataclass
class _Tally:
    """Counts answers over all runs and methods."""

    total: int
    progress: Progress
    done: int = 0

    def add(self, count: int, task: str) -> None:
        self.done += count
        self.progress(self.done, self.total, task)


def _num_texts(task: Task, config: EvaluateConfig) -> int:
    """Answers per record over all methods; `self_scales` gives one per scale."""
    return sum(len(config.scales) if method == "self_scales" else 1 for method in applicable(task, config.methods))


def _num_judged(contest: Sequence[_Job], config: EvaluateConfig) -> int:
    """Methods and further explainers whose answers the judge rates."""
    task = contest[0].task
    if config.judge is None or task.name != JUDGED_TASK:
        return 0
    return len(applicable(task, config.methods)) + len(contest) - 1


def _evaluate(
    contest: Sequence[_Job], test: Sequence[Record], config: EvaluateConfig, folder: Folder, tally: _Tally
) -> tuple[TaskEvaluation, TaskReport]:
    """One dataset: answers, then the judge, whose actors come when those of the explainers are gone."""
    job = contest[0]
    keep = _keeper(folder, job.task.name, len(test), tally)
    evaluation = _answer(contest, test, config, keep, tally)
    if config.judge is not None and job.task.name == JUDGED_TASK:
        with chat_model(config.judge.chat, config.actors, config.seed, open_journal(folder)) as model:
            evaluation = with_judgements(evaluation, Judge(model), config.judge.max_labels, keep)
    curve = [(line["step"], line["loss"]) for line in read_metrics(Folder(job.run.explainer))]
    return evaluation, build_task_report(job.task, test, evaluation, curve, config.num_browsable)


def _answer(
    contest: Sequence[_Job], test: Sequence[Record], config: EvaluateConfig, keep: Keep, tally: _Tally
) -> TaskEvaluation:
    """Further explainers first, one pool of actors after the other, because pools share the machines."""
    job, *others = contest
    name = job.task.name
    queries = [job.task.render(record).query for record in test] if others else []

    def answers(other: _Job) -> list[str]:
        pool = AnswerPool(other.run.explainer, config.actors, config.batch_size, lambda count: tally.add(count, name))
        return pool.answer("trained", queries)

    texts = {str(other.run.name): keep(str(other.run.name), partial(answers, other)) for other in others}
    pool = AnswerPool(job.run.explainer, config.actors, config.batch_size, lambda count: tally.add(count, name))
    return evaluate_task(
        job.task,
        job.dataset.records("train"),
        test,
        explain=lambda queries: pool.answer("trained", queries),
        untrained=lambda queries: pool.answer("untrained", queries),
        methods=config.methods,
        scales=config.scales,
        bootstrap=Bootstrap(samples=config.bootstrap_samples, confidence=config.confidence, seed=config.seed),
        keep=keep,
        name=job.run.name,
        others=texts,
    )


def _keeper(folder: Folder, task: str, num_records: int, tally: _Tally) -> Keep:
    """Texts under `answers/TASK/NAME.json`; a file that is torn or of another length is answered anew."""

    def keep(name: str, compute: Callable[[], list[str]]) -> list[str]:
        path, before = f"answers/{task}/{name}.json", tally.done
        texts = _read_texts(folder, path)
        if texts is None or len(texts) != num_records:
            texts = compute()
            folder.write(path, json.dumps(texts, ensure_ascii=False, indent=0).encode())
        tally.add(before + num_records - tally.done, task)
        return texts

    return keep


def _read_texts(folder: Folder, path: str) -> list[str] | None:
    try:
        texts = json.loads(folder.read(path))
    except (FileNotFoundError, ValueError):
        return None
    return texts if isinstance(texts, list) else None


def _summary(
    config: EvaluateConfig, contests: Sequence[Sequence[_Job]], evaluations: Sequence[TaskEvaluation]
) -> list[tuple[str, str]]:
    jobs = [contest[0] for contest in contests]
    target = jobs[0].dataset.manifest.target
    facts = [
        ("Target", f"{target.path}, {target.num_layers} layers of width {target.width}"),
        ("Explainers start from", ", ".join(sorted({job.card.base.path for contest in contests for job in contest}))),
        ("Seed", str(config.seed)),
    ]
    for job, evaluation in zip(jobs, evaluations, strict=True):
        first = evaluation.intervals[evaluation.featured][evaluation.metrics[0]]
        facts.append(
            (job.task.name.replace("_", " ").capitalize(), f"{first.n} held-out records in {first.num_groups} groups")
        )
    return facts
