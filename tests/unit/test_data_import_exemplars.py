"""Neuronpedia's activations become exemplars that describing and browsing read; every line that does not is counted."""

import gzip
import json

import pytest

from introspect_ray.config import BrowseConfig, ImportExemplarsConfig
from introspect_ray.data.browse import browse_latents
from introspect_ray.data.import_exemplars import import_exemplars
from introspect_ray.data.splits import split_of
from introspect_ray.errors import UserError
from introspect_ray.features.exemplar_store import open_exemplars
from introspect_ray.features.windows import window
from introspect_ray.models.loading import load_tokenizer

SOURCE = "1-test-res"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ImportExemplarsConfig().target)


def pieces_of(tokenizer, text):
    return list(window(tokenizer(text, add_special_tokens=False).input_ids, tokenizer).pieces)


def line(latent, tokens, values, interval=(-1, -1), **changes):
    low, high = interval
    row = {"modelId": "m", "layer": SOURCE, "index": str(latent), "tokens": tokens, "values": values}
    return row | {"binMin": low, "binMax": high, "binContains": 0.1, "maxValue": max(values, default=0)} | changes


def write(folder, activations, densities=(0.25, 0.0, 0.001, 0.5, 0.125)):
    features = [{"layer": SOURCE, "index": str(n), "frac_nonzero": one} for n, one in enumerate(densities)]
    batches = {
        "activations/batch-0": activations[:3],
        "activations/batch-1": activations[3:],
        "features/batch-0": features,
    }
    for name, rows in batches.items():
        path = folder / "v1/m" / SOURCE / f"{name}.jsonl.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return folder


def config(folder, **changes):
    return ImportExemplarsConfig(source=str(folder), output=str(folder / "out"), latents_per_block=2, **changes)


def test_lines_become_windows_with_the_targets_ids_and_the_rest_is_counted(tmp_path, tokenizer):
    texts = [f"The farm has a {word} and a {word}" for word in ("horse", "barn", "train", "doctor")]
    pieces = [pieces_of(tokenizer, text) for text in texts]
    length = len(pieces[0])
    assert all(len(one) == length for one in pieces)

    def values(**at):
        return [float(at.get(f"t{n}", 0)) for n in range(length)]

    bos = tokenizer.bos_token
    activations = [
        line(0, [bos, *pieces[0]], [9.0, *values(t1=2, t4=3)]),
        line(0, pieces[1], values(t2=1.5), (1.0, 2.0)),
        line(0, pieces[2], values(t2=0.5), (0.0, 1.0)),
        line(0, pieces[2], values(t2=0.5), (0.0, 1.0)),  # twice
        line(2, pieces[3], values(t0=-1, t3=7)),
        line(3, ["The", "x"], [1.0]),
        line(3, pieces[0], values()),
        line(3, [one for piece in pieces[0] for one in piece], [1.0] * len(texts[0])),  # by letters
        line(3, [pieces[0][0][:-1], pieces[0][0][-1] + pieces[0][1], *pieces[0][2:]], values(t1=3)),  # as many tokens
        line(4, pieces[0], values(t3=4)),
        line(9, pieces[0], values(t3=4)),  # of no feature
    ]
    text = import_exemplars(config(write(tmp_path, activations)))
    assert "5 windows of 3 of 5 latents" in text
    assert "; 2 not used: tokens_are_not_the_targets" in text
    for reason in ("duplicate_row", "never_fires", "tokens_and_values_differ"):
        assert f"; 1 not used: {reason}" in text
    store = open_exemplars(str(tmp_path / "out"))
    assert (store.meta.layer, store.meta.num_latents, store.meta.coder) == (1, 5, f"neuronpedia:{SOURCE}")
    assert [(one.latent, one.density, one.maximum) for one in store.latents()] == [
        (0, 0.25, 3.0), (2, 0.001, 7.0), (4, 0.125, 4.0),
    ]  # fmt: skip
    found = store.read(0)
    (top,) = found.of_kind("top")
    assert top.window.pieces == tuple(pieces[0]) and top.activations.tolist() == values(t1=2, t4=3)
    assert list(top.window.ids) == tokenizer(texts[0], add_special_tokens=False).input_ids
    assert {one.quantile: one.window.text for one in found.of_kind("quantile")} == {1: texts[1], 0: texts[2]}
    assert store.read(2).of_kind("top")[0].activations.tolist() == values(t3=7), "below zero it does not fire"
    settings = config(tmp_path)
    for split in ("train", "validation", "test"):
        there = {one.window.text for one in store.read(0, split).exemplars}
        assert there == {one for one in texts[:3] if split_of(one, settings.split) == split}
    assert not store.read(1).exemplars
    assert "3 latents that fire" in browse_latents(BrowseConfig(exemplars=str(tmp_path / "out")), lambda *_: None)


def test_files_that_are_no_source_are_refused_and_nothing_stays(tmp_path, tokenizer):
    pieces = pieces_of(tokenizer, "The farm has a horse")
    good = line(0, pieces, [1.0] * len(pieces))

    def refused(activations, **settings):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        with pytest.raises(UserError) as error:
            import_exemplars(config(write(folder, activations, **settings)))
        assert not (folder / "out").exists() or not list((folder / "out").iterdir())
        return str(error.value)

    assert "not ordered by index" in refused([line(2, good["tokens"], good["values"]), good])
    assert "index' is 'x', expected a number" in refused([line("x", good["tokens"], good["values"])])
    assert "no field 'values'" in refused([{"index": "0", "tokens": []}])
    assert "no usable activation; 1 not used: never_fires" in refused([line(0, pieces, [0.0] * len(pieces))])
    assert "frac_nonzero from 0 to 1, found '1-test-res' and 2" in refused([good], densities=(2.0,))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds 0 folders features/"):
        import_exemplars(config(tmp_path / "empty"))
