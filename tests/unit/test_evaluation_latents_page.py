"""The page of latents: complete, small enough to load, and no text of it becomes markup."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from introspect_ray.config import BrowseConfig
from introspect_ray.data.browse import browse_latents
from introspect_ray.data.merging import stats_bytes
from introspect_ray.errors import UserError
from introspect_ray.features.collection import Rows
from introspect_ray.features.contexts import window_ids
from introspect_ray.features.exemplar_store import (
    LATENTS_NAME,
    META_NAME,
    SCHEMA_VERSION,
    ExemplarMeta,
    block_name,
    encoded,
    row_table,
    window_table,
)
from introspect_ray.features.picking import Picked
from introspect_ray.features.windows import Window

LATENTS, WINDOWS = 7, 5
NASTY = '</script><b>"\u2028'


@pytest.fixture
def folder(tmp_path):
    """Latent l of 7 fires in window l of 5, at its first token, with l + 0.5; the last two never fire."""
    ids = window_ids("page", WINDOWS)
    windows = [Window((1, 2), (f"word{number}", NASTY)) for number in range(WINDOWS)]
    rows = Rows(
        np.arange(WINDOWS, dtype=np.int32),
        np.zeros(WINDOWS, np.int8),
        ids,
        np.arange(WINDOWS, dtype=np.float32) + 0.5,
        np.arange(WINDOWS + 1),
        np.zeros(WINDOWS, np.uint16),
        np.arange(WINDOWS, dtype=np.float32) + 0.5,
    )
    top = Picked(rows, np.zeros(WINDOWS, np.int64), np.full(WINDOWS, -1))
    quantile = Picked(rows, np.ones(WINDOWS, np.int64), np.arange(WINDOWS) % 2)
    counts = np.array([1, 10, 100, 100, 1, 0, 0])
    random = pa.array([False, True, False, False, False])
    files = {
        LATENTS_NAME: stats_bytes(counts, np.array([0.5, 1.5, 2.5, 3.5, 4.5, 0, 0], np.float32)),
        block_name("blocks", 0): encoded(row_table([top, quantile])),
        block_name("windows", 0): encoded(
            window_table(ids, np.zeros(WINDOWS, np.int64), windows).append_column("random", random)
        ),
    }
    meta = ExemplarMeta(
        schema_version=SCHEMA_VERSION,
        run_key="key",
        config={},
        target={"path": "some/model"},
        coder="some-sae",
        coder_digest="",
        kind="sae",
        layer=2,
        num_latents=LATENTS,
        num_live=5,
        num_tokens=1000,
        num_not_finite=0,
        texts={"used": 5},
        top=3,
        latents_per_block=100,
        files={name: len(content) for name, content in files.items()},
    )
    for name, content in (*files.items(), (META_NAME, meta.model_dump_json().encode())):
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_bytes(content)
    return tmp_path / "out"


def describe(path: Path, *rows: tuple[int, int, str, float | None]) -> str:
    lines = [
        {
            "layer": layer,
            "latent": latent,
            "text": text,
            "source": "me",
            "scores": {"fit": 1 - (score or 0), "f1": score},
        }
        for layer, latent, text, score in rows
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


def data(folder: Path, kind: str) -> list:
    """What the scripts of one kind hand to the page, file after file."""
    found = []
    for path in sorted((folder / "page" / "data").glob(f"{kind}-*.js")):
        script = path.read_text()
        assert "<" not in script and "\u2028" not in script
        call = re.fullmatch(r"(?:listed\(|loaded\(\d+, )(.*)\);\n", script, re.S)
        assert call is not None
        found.append(json.loads(call[1]))
    return found


def test_every_latent_is_listed_with_its_best_description_by_the_score_that_is_named(folder, tmp_path):
    file = describe(
        tmp_path / "d.jsonl", (2, 1, "worse", 0.1), (2, 1, NASTY, 0.7), (2, 3, "unscored", None), (0, 1, "x", 1)
    )
    line = browse_latents(
        BrowseConfig(exemplars=str(folder), descriptions=(file,), latents_per_file=3, score="f1"), lambda *_: None
    )
    (rows,) = data(folder, "list")
    assert rows[0] == [0, 0.001, 0.5, "", None]
    assert rows[1] == [1, 0.01, 1.5, NASTY, 0.7]
    assert rows[3] == [3, 0.1, 3.5, "unscored", None]
    assert [row[0] for row in rows] == list(range(LATENTS))
    assert (
        "5 latents that fire, 2 described, 1 of them ranked by f1; 1 descriptions are of other layers or latents"
        in line
    )
    details = data(folder, "latents")
    assert [sorted(part["latents"], key=int) for part in details] == [["0", "1", "2"], ["3", "4", "5"], ["6"]]
    assert [one["text"] for one in details[0]["latents"]["1"]["descriptions"]][1] == "worse"
    line = browse_latents(BrowseConfig(exemplars=str(folder), descriptions=(file,)), lambda *_: None)
    assert "no description has the score correlation to rank by (scores found: f1, fit)" in line
    assert data(folder, "list")[0][1] == [1, 0.01, 1.5, "worse", None], "the first one"


def test_exemplars_are_grouped_and_windows_stand_once_per_file(folder):
    browse_latents(BrowseConfig(exemplars=str(folder), latents_per_file=100), lambda *_: None)
    (content,) = data(folder, "latents")
    groups = dict(content["latents"]["3"]["groups"])
    assert list(groups) == ["Top", "Quantile 1", "Random"]
    (exemplar,) = groups["Top"]
    assert content["windows"][exemplar["window"]] == ["word3", NASTY]
    assert (exemplar["positions"], exemplar["values"]) == ([0], [3.5])
    assert groups["Random"][0]["values"] == []
    assert dict(content["latents"]["6"]["groups"]).keys() == {"Random"}
    assert len(content["windows"]) == WINDOWS


def test_the_page_shows_densities_by_decade(folder):
    browse_latents(BrowseConfig(exemplars=str(folder)), lambda *_: None)
    page = (folder / "page" / "index.html").read_text()
    counts = [int(count) for count in re.findall(r'title="[^"]*: (\d+) latents"', page)]
    assert len(counts) == 15 and sum(counts) == 5
    assert [place for place, count in enumerate(counts) if count] == [0, 5, 10]
    assert "2 never fire" in page
    assert "script-src 'unsafe-inline' 'self' file:" in page
    assert "http" not in page.replace("http-equiv", "")


def test_bad_descriptions_are_refused(folder, tmp_path):
    for path, words in (("none.jsonl", "does not exist"), (str(tmp_path), "does not exist")):
        with pytest.raises(UserError, match=words):
            browse_latents(BrowseConfig(exemplars=str(folder), descriptions=(path,)), lambda *_: None)
    (tmp_path / "bad.jsonl").write_bytes(b"\xff")
    with pytest.raises(UserError, match="is no text"):
        browse_latents(
            BrowseConfig(exemplars=str(folder), descriptions=(str(tmp_path / "bad.jsonl"),)), lambda *_: None
        )
