"""The built page in the package is what its sources give, and part of the package's data."""

import filecmp
import hashlib
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "introspect_ray" / "serving" / "page"
WEB = PAGE.parent / "web"
FILES = ["app.css", "app.js", "icon.svg", "index.html"]


def test_the_built_page_names_the_sources_that_it_was_built_from():
    digest = hashlib.sha256()
    sources = [f"src/{file.name}" for file in (WEB / "src").iterdir()]
    for name in sorted([*sources, "build.mjs", "package-lock.json"]):
        digest.update(name.encode() + b"\0" + (WEB / name).read_bytes() + b"\0")
    first_line = (PAGE / "app.js").read_text().splitlines()[0]
    assert first_line == f"/* sources sha256:{digest.hexdigest()} */", "run `make page`"


def test_building_gives_the_same_files(tmp_path):
    if shutil.which("node") is None or not (WEB / "node_modules").is_dir():
        pytest.skip("needs node and `npm ci` in introspect_ray/serving/web")
    subprocess.run(["node", "build.mjs", tmp_path], cwd=WEB, check=True, timeout=60)
    assert filecmp.cmpfiles(tmp_path, PAGE, FILES, shallow=False) == (FILES, [], []), "run `make page`"


def test_the_page_loads_nothing_from_elsewhere_and_ships_with_the_package():
    assert sorted(file.name for file in PAGE.iterdir()) == FILES
    text = (PAGE / "index.html").read_text()
    assert re.findall(r'(?:src|href)="([^"]*)"', text) == [
        "static/icon.svg",
        "static/app.css",
        "static/app.js",
        "openapi.json",
    ]
    assert "url(" not in (PAGE / "app.css").read_text()
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "serving/page/*" in settings["tool"]["setuptools"]["package-data"]["introspect_ray"]
