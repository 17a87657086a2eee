"""descriptions.jsonl and what may lie beside it: judgements.jsonl, and the labels of the pocket coders."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from typing import Any

from introspect_ray.data.storage import Folder
from introspect_ray.errors import UserError
from introspect_ray.features.card import coder_folder
from introspect_ray.features.delphi import LatentJudgements
from introspect_ray.features.descriptions import (
    DESCRIPTIONS_FILE,
    Description,
    description_lines,
    is_text,
    parse_descriptions,
)
from introspect_ray.features.judgements import Judgement

JUDGEMENTS_FILE = "judgements.jsonl"
SUMMARY_FILE = "summary.json"
LABELS_FILE = "labels.jsonl"
LEXICON = "lexicon"
CODER_DIGEST = "coder_digest"
"""Of summary.json: which coder's latents are described, see `folder_digest`; of vectors, their digest."""
logger = logging.getLogger(__name__)


def read_descriptions(path: str) -> list[Description]:
    """The descriptions of a descriptions.jsonl, or of a folder that holds one. Raises UserError."""
    parent, name = file_of(path, DESCRIPTIONS_FILE)
    return parse_descriptions(_text(parent, name), f"{parent.url}/{name}")


def write_descriptions(folder: Folder, descriptions: Iterable[Description]) -> None:
    """Write descriptions.jsonl in one step."""
    folder.write(DESCRIPTIONS_FILE, description_lines(descriptions).encode())


def coder_digest_of(path: str) -> str:
    """Which coder the descriptions of a file or folder are of, by the summary.json beside them; empty if none."""
    parent, _ = file_of(path, DESCRIPTIONS_FILE)
    try:
        digest = json.loads(parent.read(SUMMARY_FILE)).get(CODER_DIGEST)
    except (FileNotFoundError, NotADirectoryError, ValueError, AttributeError):
        return ""
    return digest if isinstance(digest, str) else ""


def write_coder_digest(folder: Folder, digest: str) -> None:
    """A summary.json that says which coder the descriptions of a folder are of, and no more."""
    folder.write(SUMMARY_FILE, (json.dumps({CODER_DIGEST: digest}) + "\n").encode())


def keep_coder_digest(folder: Folder, sources: Iterable[str]) -> None:
    """Say of the descriptions in a folder what all that they came from say."""
    digests = set(map(coder_digest_of, sources))
    if len(digests) == 1 and (digest := digests.pop()):
        write_coder_digest(folder, digest)


def check_coder(sources: Iterable[str], coder: str, coder_digest: str) -> None:
    """Refuse descriptions of another coder's latents, which have the same numbers. Raises UserError in one line.

    Descriptions that do not say whose they are, such as imported ones, are accepted with a warning, and so are all
    where the exemplars do not say it either.
    """
    for source in sources:
        digest = coder_digest_of(source)
        if not digest or not coder_digest:
            which = "descriptions" if not digest else "exemplars"
            logger.warning("nothing says that descriptions %s are of %s: the %s name no coder", source, coder, which)
        elif digest != coder_digest:
            raise UserError(
                f"descriptions {source} are of latents of another coder than {coder}, which the exemplars are of:"
                " expected descriptions of its latents"
            )


def lexicon_descriptions(sae: str) -> list[Description]:
    """What the labels beside a coder say: of each latent the label with its F1, then all others that fit as well.

    Raises UserError if there are no labels, or a line is none.
    """
    folder = Folder(str(coder_folder(sae)))
    found: list[Description] = []
    for number, line in enumerate(_text(folder, LABELS_FILE).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{folder.url}/{LABELS_FILE}, line {number}"
        try:
            row = json.loads(line)
            layer, latent, score = int(row["layer"]), int(row["index"]), float(row["score"])
            text, accepted = row["description"], row["accepted"]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{where} is no label: {type(error).__name__} {error}") from None
        if not all(map(is_text, [text, *accepted])):
            raise UserError(f"{where}: expected texts under 'description' and 'accepted'")
        found.append(Description(layer, latent, text, LEXICON, {"label_f1": score}))
        found += [Description(layer, latent, other, LEXICON) for other in accepted if other != text]
    return found


def judgements_of(row: dict[str, Any]) -> LatentJudgements:
    """Judgements from the JSON object that their dataclass became. Raises what such an object may lack."""
    judged = [
        Judgement(**{**one, "tokens": tuple(one["tokens"]), "activations": tuple(one["activations"])})
        for one in row["judgements"]
    ]
    return LatentJudgements(**{**row, "judgements": tuple(judged)})


def read_judgements(folder: Folder, name: str) -> Iterator[LatentJudgements]:
    """The judgements of a judgements.jsonl. Raises UserError that names the line of one that is none."""
    for number, line in enumerate(_text(folder, name).split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield judgements_of(json.loads(line))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{folder.url}/{name}, line {number} is no judgement: {error}") from None


def file_of(path: str, default: str) -> tuple[Folder, str]:
    """Folder and name of a file; of a folder, its `default`."""
    parent, _, name = path.rstrip("/").rpartition("/")
    parent = parent or ("/" if path.startswith("/") else ".")
    return (Folder(parent), name) if name.endswith(".jsonl") else (Folder(path), default)


def _text(folder: Folder, name: str) -> str:
    try:
        return folder.read(name).decode()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder.url}/{name} does not exist") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{folder.url}/{name} is no text: {error}") from None
