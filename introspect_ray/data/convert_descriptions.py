"""Descriptions between our descriptions.jsonl, Neuronpedia's batches, delphi's folders and the pocket lexicon.

    source files --parse (features/)--> descriptions, judgements, what was not used --> files of the other layout
                                                                                    --> unused.jsonl, summary.json

Judgements are what delphi's scores consist of: `judgements.jsonl` keeps them, so that they can be written again.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from introspect_ray.config import ConvertDescriptionsConfig, resolved
from introspect_ray.data.description_files import (
    CODER_DIGEST,
    JUDGEMENTS_FILE,
    LEXICON,
    SUMMARY_FILE,
    coder_digest_of,
    file_of,
    lexicon_descriptions,
    read_descriptions,
    read_judgements,
    write_descriptions,
)
from introspect_ray.data.identity import folder_digest
from introspect_ray.data.storage import Folder, new_folder
from introspect_ray.errors import UserError
from introspect_ray.features import delphi, neuronpedia
from introspect_ray.features.card import coder_folder
from introspect_ray.features.delphi import Key, LatentJudgements
from introspect_ray.features.descriptions import DESCRIPTIONS_FILE, Description, Imported, by_latent, ranked_by

UNUSED_FILE = "unused.jsonl"


@dataclass
class _Read:
    """All that a source says."""

    imported: Imported
    judgements: list[LatentJudgements] = field(default_factory=list)


def convert_descriptions(config: ConvertDescriptionsConfig) -> str:
    """Read the source and write the output folder; one line about what was written and what was not used."""
    found = _READERS[config.source_format](config)
    imported = found.imported
    if not imported.descriptions:
        raise UserError(
            f"source {config.source} holds no description in format {config.source_format}{_listed(imported.unused)}"
        )
    num_read = len(imported.descriptions)
    with new_folder(config.output) as folder:
        written = _WRITERS[config.output_format](folder, config, found)
        unused = "".join(
            json.dumps({"where": where, "reason": reason}, ensure_ascii=False) + "\n"
            for where, reason in imported.unused
        )
        folder.write(UNUSED_FILE, unused.encode())
        reasons = _reasons(imported.unused)
        summary = {
            "descriptions_read": num_read,
            "descriptions_written": written,
            "latents": len(by_latent(imported.descriptions)),
            "not_used": reasons,
            "config": resolved(config),
        } | _coder(config)
        folder.write(SUMMARY_FILE, (json.dumps(summary, indent=1) + "\n").encode())
    return (
        f"wrote {config.output}: {written} descriptions of {summary['latents']} latents in format"
        f" {config.output_format}{_listed(imported.unused)}"
    )


def _coder(config: ConvertDescriptionsConfig) -> dict[str, str]:
    """Which coder the descriptions are of, where that is known: files of others do not say it."""
    lexicon = config.source_format == LEXICON
    digest = folder_digest(coder_folder(config.source)) if lexicon else coder_digest_of(config.source)
    return {CODER_DIGEST: digest} if digest else {}


# --- reading ----------------------------------------------------------------------------------------------------


def _read_ours(config: ConvertDescriptionsConfig) -> _Read:
    descriptions = read_descriptions(config.source)
    parent, name = file_of(config.source, DESCRIPTIONS_FILE)
    beside = name.removesuffix(DESCRIPTIONS_FILE) + JUDGEMENTS_FILE
    judgements = list(read_judgements(parent, beside)) if parent.size(beside) is not None else []
    return _Read(Imported(descriptions), judgements)


def _read_lexicon(config: ConvertDescriptionsConfig) -> _Read:
    return _Read(Imported(lexicon_descriptions(config.source)))


def _read_neuronpedia(config: ConvertDescriptionsConfig) -> _Read:
    """Every batch of explanations below the source; other files of the bulk layout hold no descriptions."""
    folder = Folder(config.source)
    batches: list[tuple[str, int, str]] = []
    for path in folder.files():
        parent, _, name = path.rpartition("/")
        number = neuronpedia.batch_number(name)
        if number is not None and parent.rpartition("/")[2] in ("", "explanations"):
            batches.append((parent, number, path))
    if not batches:
        raise UserError(f"source {config.source} holds no explanations/batch-N.jsonl.gz")
    return _Read(neuronpedia.read_explanations((path, folder.read(path)) for *_, path in sorted(batches)))


def _read_delphi(config: ConvertDescriptionsConfig) -> _Read:
    """Explanations with the scores that are known; files of other scorers are counted."""
    folder = Folder(config.source)
    names = [path for path in folder.files() if path.endswith(".txt")]
    explained = [name for name in names if name.startswith("explanations/")]
    if not explained:
        raise UserError(f"source {config.source} holds no explanations/LATENT.txt")
    imported = delphi.read_explanations((path.removeprefix("explanations/"), folder.read(path)) for path in explained)
    texts = {(one.layer, one.latent): one.text for one in imported.descriptions}
    scores: dict[Key, dict[str, float | None]] = {}
    judgements: list[LatentJudgements] = []
    for path in names:
        kind, _, rest = path.partition("/")
        scorer, _, name = rest.partition("/")
        if kind != "scores":
            continue
        reason = ""
        if scorer in delphi.CLASSIFIERS:
            judged = delphi.read_judgements(scorer, name, folder.read(path))
            if judged is not None and (key := (judged.layer, judged.latent)) in texts:
                judgements.append(replace(judged, text=texts[key]))
                scores.setdefault(key, {}).update(delphi.judged_scores(judged))
                continue
            reason = "name_of_no_latent" if judged is None else "score_without_explanation"
        elif scorer == delphi.SIMULATION:
            simulated = delphi.read_simulation(name, folder.read(path))
            if simulated is not None and simulated[0] in texts:
                scores.setdefault(simulated[0], {})[delphi.CORRELATION] = simulated[1]
                continue
            reason = "name_of_no_latent" if simulated is None else "score_without_explanation"
        imported.unused.append((path, reason or "scorer_not_known"))
    imported.descriptions = [
        replace(one, scores=scores.get((one.layer, one.latent), {})) for one in imported.descriptions
    ]
    return _Read(imported, judgements)


# --- writing ----------------------------------------------------------------------------------------------------


def _write_ours(folder: Folder, _config: ConvertDescriptionsConfig, found: _Read) -> int:
    if found.judgements:
        lines = (json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in found.judgements)
        folder.write(JUDGEMENTS_FILE, "".join(lines).encode())
    write_descriptions(folder, found.imported.descriptions)
    return len(found.imported.descriptions)


def _write_neuronpedia(folder: Folder, config: ConvertDescriptionsConfig, found: _Read) -> int:
    descriptions = found.imported.descriptions
    files = neuronpedia.explanation_batches(descriptions, config.model_id, config.source_set, config.author_id)
    for path, content in files.items():
        folder.write(path, content)
    _count_judgements(found, found.judgements, "neuronpedia_holds_no_judgements")
    return len(descriptions)


def _write_delphi(folder: Folder, config: ConvertDescriptionsConfig, found: _Read) -> int:
    """One explanation per latent, the judgements of just that text, and its correlation."""
    chosen: dict[Key, Description] = {}
    for key, candidates in by_latent(found.imported.descriptions).items():
        chosen[key] = best(candidates, config.delphi_best_by)
        found.imported.unused += [
            (f"layer {key[0]} latent {key[1]}: {other.text}", "delphi_holds_one_per_latent")
            for other in candidates
            if other is not chosen[key]
        ]
    for (layer, latent), one in chosen.items():
        name = delphi.file_name(config.delphi_module.replace("{layer}", str(layer)), latent)
        folder.write(f"explanations/{name}", delphi.explanation_file(one.text))
    others: list[LatentJudgements] = []
    scorers: dict[Key, set[str]] = {key: set() for key in chosen}
    for judged in found.judgements:
        description = chosen.get((judged.layer, judged.latent))
        if description is None or judged.text != description.text:
            others.append(judged)
            continue
        name = delphi.file_name(config.delphi_module.replace("{layer}", str(judged.layer)), judged.latent)
        folder.write(f"scores/{judged.scorer}/{name}", delphi.judgements_file(judged.judgements))
        scorers[judged.layer, judged.latent].add(judged.scorer)
    for key, one in chosen.items():
        _write_scores(folder, config, found, one, scorers[key])
    _count_judgements(found, others, "judgements_of_another_description")
    return len(chosen)


def best(candidates: Sequence[Description], score: str | None) -> Description:
    """The candidate with the largest such score, the first of equal ones; those without it come last."""
    return candidates[0] if score is None else ranked_by(score, candidates)[0]


def _write_scores(
    folder: Folder, config: ConvertDescriptionsConfig, found: _Read, one: Description, judged: set[str]
) -> None:
    """Write the correlation of a description, and count the scores that delphi's layout has no place for."""
    name = delphi.file_name(config.delphi_module.replace("{layer}", str(one.layer)), one.latent)
    for score, value in one.scores.items():
        if score == config.delphi_simulation:
            folder.write(f"scores/{delphi.SIMULATION}/{name}", delphi.simulation_file(value))
        elif score.partition("/")[0] not in judged:
            where = f"layer {one.layer} latent {one.latent}: score {score}"
            scorer = score.partition("/")[0] in delphi.CLASSIFIERS
            found.imported.unused.append(
                (where, "score_without_judgements" if scorer else "delphi_holds_no_such_score")
            )


def _count_judgements(found: _Read, judgements: Iterable[LatentJudgements], reason: str) -> None:
    found.imported.unused += [
        (f"layer {one.layer} latent {one.latent}: judgements by {one.scorer}", reason) for one in judgements
    ]


_READERS = {
    "descriptions": _read_ours,
    "lexicon": _read_lexicon,
    "neuronpedia": _read_neuronpedia,
    "delphi": _read_delphi,
}
_WRITERS = {"descriptions": _write_ours, "neuronpedia": _write_neuronpedia, "delphi": _write_delphi}


def _reasons(unused: Iterable[tuple[str, str]]) -> dict[str, int]:
    return dict(sorted(Counter(reason for _, reason in unused).items()))


def _listed(unused: Iterable[tuple[str, str]]) -> str:
    reasons: Any = _reasons(unused)
    return "".join(f"; {count} not used: {reason}" for reason, count in reasons.items())
