"""Writing the page of one coder's latents from its exemplars and any files of descriptions. No Ray, no model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

from introspect_ray.config import BrowseConfig
from introspect_ray.data.storage import Folder
from introspect_ray.errors import UserError
from introspect_ray.evaluation.latents_page import best_score, page_files
from introspect_ray.features.descriptions import DESCRIPTIONS_FILE, Description, parse_descriptions
from introspect_ray.features.exemplar_store import ExemplarMeta, open_exemplars


def browse_latents(config: BrowseConfig, progress: Callable[[int, int], None]) -> str:
    """Write the page; one line about it. Raises UserError for exemplars or descriptions that cannot be read."""
    store = open_exemplars(config.exemplars)
    descriptions, others = _descriptions(config.descriptions, store.meta)
    folder = Folder(config.output or f"{store.url}/page")
    num_files = 0
    for name, content in page_files(store, descriptions, config, progress):
        folder.write(name, content.encode())
        num_files += 1
    aside = f"; {others} descriptions are of other layers or latents" if others else ""
    return (
        f"wrote {folder.url}/index.html and {num_files - 1} files of data: {store.meta.num_live} latents that fire,"
        f" {len(descriptions)} described{aside}"
    )


def _descriptions(paths: Sequence[str], meta: ExemplarMeta) -> tuple[dict[int, list[Description]], int]:
    """Descriptions of this coder's latents, those with the better score first; how many are of none of them."""
    found: dict[int, list[Description]] = defaultdict(list)
    others = 0
    for path in paths:
        parent, _, name = path.rstrip("/").rpartition("/")
        if not name.endswith(".jsonl"):
            parent, name = path.rstrip("/"), DESCRIPTIONS_FILE
        try:
            content = Folder(parent or ("/" if path.startswith("/") else ".")).read(name).decode()
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"descriptions {path} do not exist: expected a {DESCRIPTIONS_FILE}") from None
        except UnicodeDecodeError as error:
            raise UserError(f"descriptions {path} are not UTF-8 text: {error.reason}") from None
        for one in parse_descriptions(content, path):
            if one.layer == meta.layer and one.latent < meta.num_latents:
                found[one.latent].append(one)
            else:
                others += 1
    for candidates in found.values():
        candidates.sort(key=_score, reverse=True)
    return dict(found), others


def _score(description: Description) -> float:
    score = best_score(description)
    return float("-inf") if score is None else score
