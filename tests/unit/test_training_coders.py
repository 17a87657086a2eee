"""Training of a coder from a stream: learns, repeats, goes on after any stop as if there had been none. No Ray.

SAEs go the same way in tests/cluster, because importing sae_lens is slow.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Generator, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from introspect_ray.config import TrainTranscoderConfig
from introspect_ray.errors import RunFailed, UserError
from introspect_ray.features.coder import fraction_unexplained
from introspect_ray.features.quality import QualitySums
from introspect_ray.features.sae import load_sae
from introspect_ray.features.shuffling import Part
from introspect_ray.training.coder_loop import export, train
from introspect_ray.training.coder_run import CoderRun, prepare
from introspect_ray.training.metrics import read_metrics

WIDTH = 12


def known_map(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """y answers every direction that is present in x, beside a linear part."""
    fixed, generator = torch.Generator().manual_seed(1), torch.Generator().manual_seed(seed)
    directions, answers = torch.randn(2, 20, WIDTH, generator=fixed)
    linear = 0.3 * torch.randn(WIDTH, WIDTH, generator=fixed)
    present = (torch.rand(count, 20, generator=generator) < 0.08).float()
    x = present @ directions
    return 5 * x, 0.01 * (present @ answers + x @ linear)


def read_from(block: int, first: int) -> Iterator[Part]:
    """An endless stream in blocks of 50 to 90 rows."""
    while True:
        x, y = known_map(50 + 10 * (block % 5), seed=100 + block)
        yield Part(block, first, (x[first:], y[first:]), lost=int(not first and block % 20 == 3))
        block, first = block + 1, 0


@lru_cache
def _texts() -> str:
    """A file of 40 texts; none is read here but by its number."""
    path = Path(tempfile.mkdtemp()) / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {number}"}) + "\n" for number in range(40)))
    return str(path)


def run(folder: Path, **changes: Any) -> CoderRun:
    tree: dict[str, Any] = {"output": str(folder), "num_latents": 40, "num_active": 2, "steps": 90, "batch_size": 64}
    tree |= {"learning_rate": 1e-2, "dead_after": 20, "stream": {"buffer_batches": 8}, "held_out_tokens": 500}
    tree |= {"trainer": {"log_every": 10, "checkpoint_every": 25}, "source": {"path": _texts()}}
    prepared = prepare(TrainTranscoderConfig.model_validate(tree | changes))
    fitted, measured = prepared.read(held_out=False).to_pylist(), prepared.read(held_out=True).to_pylist()
    texts = [text for _, text in prepared.texts]
    assert measured == texts[::20] and fitted == [text for text in texts if text not in measured] and len(fitted) == 38
    prepared.claim.write()
    return prepared.run


def held_out() -> Iterator[Part]:
    for block in range(50):
        yield Part(block, 0, known_map(100, seed=10_000 + block), lost=2 * (block == 1))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[CoderRun, dict[str, Any]]:
    done = run(tmp_path_factory.mktemp("whole"))
    assert [line["step"] for line in train(done, read_from)] == list(range(10, 91, 10))
    return done, export(done, held_out())


def test_it_learns_and_reports_what_it_is_worth(whole: tuple[CoderRun, dict[str, Any]]) -> None:
    done, report = whole
    found, lines = report["held_out"], read_metrics(done.folder)
    assert lines[-1]["lost"] > 3
    assert found["unexplained"] < 0.5 * found["unexplained_without_latents"] < 0.5
    assert found["tokens"] == 500 and 1 < found["active_per_token"] < 4
    assert report["lost_tokens"] == 2 + lines[-1]["lost"]
    assert lines[0]["loss"] > lines[-1]["loss"] and lines[-1]["tokens"] == 90 * 64
    assert set(lines[0]) == {"step", "tokens", "loss", "unexplained", "active", "dead", "lost"}
    names = set(done.folder.names())
    assert names == {"config.json", "metrics.jsonl", "cfg.json", "sae_weights.safetensors", "training.json"}
    assert prepare(done.config).run.report() == report


def test_held_out_numbers_are_those_of_the_definition(whole: tuple[CoderRun, dict[str, Any]]) -> None:
    coder = load_sae(whole[0].config.output)
    assert (coder.kind, coder.layer, coder.reads, coder.writes) == ("transcoder", 1, "mlp_input", "mlp_added")
    parts = [known_map(100, seed=10_000 + block) for block in range(5)]
    x, y = (torch.cat(column) for column in zip(*parts, strict=True))
    found, latents = whole[1]["held_out"], coder.encode(x)
    assert found["unexplained"] == pytest.approx(fraction_unexplained(coder.forward(x), y), rel=1e-5)
    nothing = coder.decode(torch.zeros_like(latents), x)
    assert found["unexplained_without_latents"] == pytest.approx(fraction_unexplained(nothing, y), rel=1e-5)
    assert found["active_per_token"] == pytest.approx((latents != 0).sum().item() / 500)
    assert found["dead_share"] == pytest.approx((~(latents != 0).any(0)).float().mean().item())
    sums = QualitySums(coder)
    sums.add(x[:7], y[:7])
    sums.add(x[7:], y[7:])
    assert sums.quality().unexplained == pytest.approx(found["unexplained"], rel=1e-6)


def test_too_many_lost_tokens_end_the_run(tmp_path: Path) -> None:
    def losing(block: int, first: int) -> Iterator[Part]:
        for part in read_from(block, first):
            yield Part(part.block, part.first, part.columns, lost=9 * (part.block > 12))

    failing = run(tmp_path, max_lost_share=0.05)
    with pytest.raises(RunFailed, match=r"tokens are not finite in float32, more than max_lost_share 0\.05 allows"):
        list(train(failing, losing))


@pytest.mark.parametrize("stops", [(7,), (3, 6), (9,), (9, None)])
def test_a_stopped_run_ends_as_one_that_was_not(
    whole: tuple[CoderRun, dict[str, Any]], tmp_path: Path, stops: tuple[int | None, ...]
) -> None:
    """Stopped after so many lines: in the middle of a window, twice, before the last checkpoint, before the export."""
    stopped = run(tmp_path)
    for stop in stops:
        lines = cast(Generator[dict[str, Any]], train(stopped, read_from))
        for line in lines:
            if stop is not None and line["step"] == 10 * stop:
                break
        lines.close()
    rest = list(train(run(tmp_path), read_from))
    assert [line["step"] for line in rest][-1:] == ([] if None in stops else [90])
    assert read_metrics(stopped.folder) == read_metrics(whole[0].folder)
    report = export(stopped, held_out())
    assert report == whole[1]
    ours, expected = load_sae(str(tmp_path)), load_sae(whole[0].config.output)
    for name in ("encoder", "encoder_bias", "decoder", "decoder_bias", "threshold", "skip"):
        assert torch.equal(getattr(ours, name), getattr(expected, name)), name


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"layer": 9}, "layer is 9, but pocket:target_a has 4 layers: expected 0 to 3"),
        ({"source": {"path": "pocket", "limit": 1}}, "gives 1 text, expected 2 or more"),
        ({"source": {"path": "pocket", "format": "mmlu"}}, "which format mmlu needs"),
        ({"target": {"path": "no/such_model/here"}}, "does not exist"),
    ],
)
def test_bad_input_is_refused_before_anything_starts(tmp_path: Path, changes: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as caught:
        run(tmp_path, **changes)
    assert line in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_latents_need_tokens_to_begin_as(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_latents is 1000, but latents begin as tokens of the first buffer"):
        run(tmp_path, num_latents=1000)
    with pytest.raises(ValueError, match="num_active is 41, expected at most num_latents 40"):
        run(tmp_path, num_active=41)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    run(tmp_path / "one")
    with pytest.raises(UserError, match="belongs to another config \\(steps is 90 there, 91 here\\)"):
        run(tmp_path / "one", steps=91)
    run(tmp_path / "one", trainer={"log_every": 3})  # changes nothing about the coder
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "notes.txt").touch()
    with pytest.raises(UserError, match=r"is not empty and holds no training of this kind of coder \(notes.txt"):
        run(tmp_path / "two")
    content = json.loads((tmp_path / "one" / "config.json").read_text())
    (tmp_path / "one" / "config.json").write_text(json.dumps(content | {"config": {}}).replace("config", "other"))
    with pytest.raises(UserError, match=r"its config\.json is none of this version's"):
        run(tmp_path / "one")
