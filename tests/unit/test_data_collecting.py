"""From texts to exemplars on disk, without Ray: what a dense pass over everything finds, for any cut of the work."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from collect_helpers import collect_config, collect_here, content, damaged

from introspect_ray.config import SourceConfig
from introspect_ray.data.attempts import BATCH_DEATHS, ITEM_DEATHS, Attempt
from introspect_ray.data.collecting import ScanOrder, plan_collection
from introspect_ray.data.merging import BlockOrder, GatherOrder, Merging
from introspect_ray.data.scanning import Scanner, finished_info, scan_shard
from introspect_ray.data.splits import SPLITS, split_of
from introspect_ray.data.storage import Folder
from introspect_ray.data.texts import read_texts
from introspect_ray.errors import RunFailed, UserError
from introspect_ray.features import exemplar_store
from introspect_ray.features.exemplar_store import open_exemplars
from introspect_ray.models.tokens import encode_text
from introspect_ray.pocket.sources import rows

CODERS = ("pocket:sae", "pocket:transcoder")
TEXTS = [row["text"] for row in rows("text")[:90]]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return collect_config(tmp_path_factory.mktemp("collected"), TEXTS, coders=CODERS)


@pytest.fixture(scope="module")
def scanner(config):
    return Scanner.load(config)


@pytest.fixture(scope="module")
def stores(config, scanner):
    return collect_here(config, scanner)


def windows_of(config, scanner):
    """(split, ids, dense latents per coder) of every window, each text alone through the whole model."""
    found = []
    bos = scanner.tokenizer.bos_token_id
    for text in dict.fromkeys(TEXTS):
        ids = encode_text(scanner.tokenizer, text, add_bos=False)
        split = SPLITS.index(split_of(text, config.split))
        for start in range(0, len(ids), config.context_tokens - 1):
            part = ids[start : start + config.context_tokens - 1]
            kept: dict[int, torch.Tensor] = {}
            mlp = scanner.model.model.layers[1].mlp
            hook = mlp.register_forward_pre_hook(lambda _module, inputs, kept=kept: kept.update({1: inputs[0][0, 1:]}))
            with torch.no_grad():
                states = scanner.model(torch.tensor([[bos, *part]]), output_hidden_states=True).hidden_states
            hook.remove()
            inputs = (states[2][0, 1:], kept[1])
            latents = [coder.encode(x).numpy() for coder, x in zip(scanner.coders, inputs, strict=True)]
            for at in range(0, len(part), config.window_tokens):
                stop = at + config.window_tokens
                found.append((split, tuple(part[at:stop]), [dense[at:stop] for dense in latents]))
    return found


def test_top_exemplars_densities_and_maxima_are_those_of_a_dense_pass(config, scanner, stores):
    windows = windows_of(config, scanner)
    for number, store in enumerate(stores.values()):
        everything = np.concatenate([latents[number] for *_, latents in windows])
        assert store.meta.num_tokens == len(everything)
        assert (store.counts == (everything > 0).sum(0)).all()
        np.testing.assert_allclose(store.maxima, everything.max(0), rtol=1e-4, atol=1e-4)
        assert [found.latent for found in store.latents()] == np.flatnonzero((everything > 0).any(0)).tolist()
        for latent in range(0, store.meta.num_latents, 41):
            for split in (None, "train", "test"):
                inside = [w for w in windows if split in (None, SPLITS[w[0]])]
                peaks = sorted((w[2][number][:, latent].max() for w in inside), reverse=True)
                expected = [peak for peak in peaks[: config.limits.top] if peak > 0]
                top = store.read(latent, split).of_kind("top")
                np.testing.assert_allclose([e.activations.max() for e in top], expected, rtol=1e-4, atol=1e-4)
                for exemplar in store.read(latent, split).exemplars:
                    same = [w[2][number][:, latent] for w in inside if w[1] == exemplar.window.ids]
                    assert any(np.allclose(exemplar.activations, there, rtol=1e-4, atol=1e-4) for there in same)
                    assert (exemplar.activations.max() > 0) or exemplar.kind in ("random", "silent")
                    assert exemplar.kind != "silent" or exemplar.activations.max() == 0
                    assert (exemplar.quantile is not None) == (exemplar.kind == "quantile")


@pytest.mark.parametrize(
    "changes",
    [
        {"texts_per_shard": 8, "latents_per_block": 500, "buffer_rows": 1},
        {"texts_per_shard": 4096, "latents_per_block": 10**6},
    ],
)
def test_shards_blocks_and_buffers_change_nothing(scanner, stores, changes, tmp_path):
    other = collect_here(collect_config(tmp_path, TEXTS, coders=CODERS, **changes), scanner)
    for name, store in stores.items():
        assert content(other[name]) == content(store)


def test_every_live_latent_has_exemplars_of_its_own_and_random_ones_at_the_base_rate(config, stores):
    for store in stores.values():
        shared = None
        for latent in range(0, store.meta.num_latents, 3):
            read = store.read(latent)
            kinds = Counter(exemplar.kind for exemplar in read.exemplars)
            assert (kinds["top"] > 0) == (read.maximum > 0) == (kinds["quantile"] > 0)
            assert kinds["top"] <= config.limits.top
            random = [exemplar.window.ids for exemplar in read.of_kind("random")]
            shared = shared or random
            assert random == shared
        assert len(shared) == sum(len(store.read(0, split).of_kind("random")) for split in SPLITS)


def test_splits_share_no_text(config, stores):
    texts = defaultdict(set)
    for text in TEXTS:
        texts[split_of(text, config.split)].add(text)
    store = stores["sae"]
    for split in SPLITS:
        others = [text for name in SPLITS if name != split for text in texts[name]]
        for latent in range(0, store.meta.num_latents, 101):
            for exemplar in store.read(latent, split).exemplars:
                assert any(exemplar.window.text in text for text in texts[split])
                whole = len(exemplar.window) < config.window_tokens or exemplar.window.text in others
                assert whole or not any(exemplar.window.text == text for text in others)


def test_the_same_run_continues_and_redoes_what_is_damaged(scanner, tmp_path):
    again = collect_config(tmp_path, TEXTS, coders=CODERS)
    expected = content(collect_here(again, scanner)["sae"])
    plan = plan_collection(again)
    infos = [finished_info(plan.work, order) for order in plan.scans]
    assert all(infos) and len(infos) == 3
    rows_file = Path(again.output) / "work" / "scans" / "00" / "rows-00001"
    rows_file.write_bytes(rows_file.read_bytes()[:-100])  # a truncated shard
    (Path(again.output) / "work" / "shards" / "shard-00002.json").write_text('{"run_key": ')
    assert [bool(finished_info(plan.work, order)) for order in plan.scans] == [True, False, False]
    foreign = ScanOrder(0, "another run")
    assert finished_info(plan.work, foreign) is None
    assert content(collect_here(again, scanner)["sae"]) == expected


def test_a_shard_that_is_damaged_afterwards_is_named_and_made_again(scanner, tmp_path):
    config = collect_config(tmp_path, TEXTS[:40])
    collect_here(config, scanner)
    plan = plan_collection(config)
    scans = Merging.of(plan).scans[0]
    readers = {"windows": lambda: scans.windows(1), "rows": lambda: scans.rows(0), "pool": lambda: scans.pool}
    for kind, read in readers.items():
        file = Path(config.output) / "work" / "scans" / "00" / f"{kind}-00001"
        whole = file.read_bytes()
        file.write_bytes(whole[:80] + bytes(byte ^ 255 for byte in whole[80:100]) + whole[100:])
        with pytest.raises(RunFailed, match=r"shard 1 of .*/work was damaged .*; the same command makes it again"):
            read()
        assert finished_info(plan.work, plan.scans[1]) is None
        scan_shard(scanner, config, plan.work, plan.scans[1], "run")
        assert file.read_bytes() == whole


def test_what_a_step_of_merging_left_damaged_is_made_again(scanner, tmp_path):
    config = collect_config(tmp_path, TEXTS[:40])
    expected = content(collect_here(config, scanner)["sae"])
    plan = plan_collection(config)
    order = Merging.of(plan).orders(BlockOrder)[1]
    for name in ("chosen/00/rows-00001", "chosen/00/windows-00001", "scans/00/gathered-00001"):
        file = Path(config.output) / "work" / name
        file.write_bytes(file.read_bytes()[:30])
        merging = Merging.of(plan)
        assert merging.finished(order)
        with pytest.raises(RunFailed, match=r"what is merged in .*/work was damaged .*; the same command makes it"):
            for other in (*(() if "gathered" in name else merging.orders(GatherOrder)), order):
                merging.make(other)
        assert merging.finished(order) is None
        assert content(collect_here(config, scanner)["sae"]) == expected


def test_merging_reads_what_shards_wrote_about_once_however_many_blocks_there_are(scanner, tmp_path, monkeypatch):
    """As many bytes of every file as it has, and the two offsets of each part; one part per shard and block."""
    read = Counter()
    calls = Counter()
    whole = Folder.read

    def counted(folder, name, start=None, end=None):
        content = whole(folder, name, start, end)
        if "/work" in folder.url and not name.startswith("plan/"):
            read[name] += len(content)
            calls[name] += 1
        return content

    config = collect_config(tmp_path, TEXTS, latents_per_block=200)
    with monkeypatch.context() as patch:
        patch.setattr(Folder, "read", counted)
        collect_here(config, scanner)
    merging = Merging.of(plan_collection(config))
    shards, blocks = merging.num_shards, merging.scans[0].num_blocks
    assert shards > 2 and blocks == 8
    assert {name.rpartition("-")[0] for name in read} >= {
        f"{folder}/00/{kind}"
        for folder, kind in (("scans", "rows"), ("scans", "windows"), ("scans", "gathered"), ("chosen", "windows"))
    }
    for name, size in read.items():
        if name.startswith(("scans/", "chosen/")):
            assert size <= merging.work.size(name) + 8 * max(shards, blocks), name
            assert calls[name] <= 2 * max(shards, blocks), name


def test_tokens_without_numbers_are_counted_and_their_windows_left_out(scanner, tmp_path):
    config = collect_config(tmp_path, TEXTS)
    broken = damaged(scanner, " barn")
    store = collect_here(config, broken)["sae"]
    windows = [exemplar.window.text for latent in range(0, 1536, 20) for exemplar in store.read(latent).exemplars]
    ids = [encode_text(scanner.tokenizer, text, add_bos=False) for text in dict.fromkeys(TEXTS)]
    lost = 0
    for text in ids:
        for start in range(0, len(text), config.context_tokens - 1):
            part = [scanner.tokenizer.bos_token_id, *text[start : start + config.context_tokens - 1]]
            with torch.no_grad():
                states = broken.model(torch.tensor([part]), output_hidden_states=True).hidden_states
            lost += int((~states[2][0, 1:].isfinite().all(dim=1)).sum())
    assert store.meta.num_not_finite == lost > 0
    assert store.meta.num_tokens == sum(map(len, ids)) - lost
    assert windows and not any("barn" in text for text in windows)
    assert np.isfinite(store.maxima).all()


def test_bad_input_is_refused_before_weights_are_read(tmp_path):
    def refusal(**changes):
        with pytest.raises(UserError) as caught:
            plan_collection(collect_config(tmp_path, ["a text"], **changes))
        return str(caught.value)

    narrow = tmp_path / "narrow"
    narrow.mkdir()
    shipped = json.loads((Path(exemplar_store.__file__).parents[1] / "pocket/artifacts/sae/cfg.json").read_text())
    (narrow / "cfg.json").write_text(json.dumps(shipped | {"d_in": 64}))
    (narrow / "sae_weights.safetensors").write_bytes(b"")
    assert "feature vectors of width 64: the target has width 160" in refusal(coders=[str(narrow)])
    (narrow / "cfg.json").write_text(json.dumps(shipped))
    assert "cannot be read" in refusal(coders=[str(narrow)])
    assert "does not exist" in refusal(coders=["pocket:none"])
    assert "has no usable text among 1 rows (empty_text: 1)" in refusal(source={"path": write(tmp_path, [" "])})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("mine")
    assert "is not empty and holds no exemplars (letter.txt, ...)" in refusal()


def write(folder, texts):
    path = folder / "other.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def test_another_config_does_not_take_over_a_folder(scanner, tmp_path):
    texts = TEXTS[:9]
    collect_here(collect_config(tmp_path, texts), scanner)
    with pytest.raises(UserError, match=r"belongs to another config \(window_tokens is 8 there, 9 here\)"):
        plan_collection(collect_config(tmp_path, texts, window_tokens=9))
    with pytest.raises(UserError, match=r"source .* changed since it was begun"):
        plan_collection(collect_config(tmp_path, texts[:8]))
    assert plan_collection(collect_config(tmp_path, texts, max_error_share=1)).run_key


def test_rows_of_the_source_are_counted_once_each(tmp_path):
    found = read_texts(SourceConfig(path=write(tmp_path, ["b", "a", " ", "b", "a", "c", " a "])))
    assert found.reasons == {"duplicate_row": 3, "empty_text": 1}
    assert list(found) == [(0, "b"), (1, "a"), (5, "c")]
    assert found.num_used == 3


def test_a_source_that_changes_between_passes_is_noticed(tmp_path):
    file = tmp_path / "texts.jsonl"
    rows_of = [json.dumps({"text": text}) + "\n" for text in ("one", "two", "two", "three")]
    file.write_text("".join(rows_of))
    texts = read_texts(SourceConfig(path=str(file)))
    assert list(texts) == [(0, "one"), (1, "two"), (3, "three")]
    assert [(row, reason) for row, _, reason in texts.rows() if reason] == [(2, "duplicate_row")]
    for now, said in ((rows_of[:3], "shorter"), (rows_of * 2, "longer")):
        file.write_text("".join(now))
        with pytest.raises(UserError, match=f"has become {said}"):
            list(texts)


def test_folders_that_are_no_exemplars_are_refused(config, stores, tmp_path):
    with pytest.raises(UserError, match=r"has no exemplars.json: choose one of sae, transcoder"):
        open_exemplars(config.output)
    with pytest.raises(UserError, match=r"collect_exemplars.py writes it last"):
        open_exemplars(str(tmp_path))
    with pytest.raises(UserError, match=r"has latents 0 to 1535, none is 1536"):
        stores["sae"].read(1536)
    (tmp_path / "exemplars.json").write_text(json.dumps({"schema_version": 99}))
    with pytest.raises(UserError, match=r"schema version 99"):
        open_exemplars(str(tmp_path))
    one = tmp_path / "one"
    one.mkdir()
    for name in ("exemplars.json", "latents.parquet"):
        (one / name).write_bytes((Path(config.output) / "sae" / name).read_bytes())
    (one / "latents.parquet").write_bytes(b"short")
    with pytest.raises(UserError, match=r"latents.parquet has 5 bytes, exemplars.json says"):
        open_exemplars(str(one)).latents()


def test_damage_of_finished_exemplars_is_the_readers_error(scanner, tmp_path):
    store = collect_here(collect_config(tmp_path, TEXTS[:20]), scanner)["sae"]
    file = Path(store.url) / exemplar_store.block_name("blocks", 0)
    whole = file.read_bytes()
    file.write_bytes(whole[:40] + bytes(byte ^ 255 for byte in whole[40:60]) + whole[60:])
    with pytest.raises(UserError, match=r"blocks/block-00000.parquet cannot be read: "):
        open_exemplars(store.url).read(0)
    file.unlink()
    with pytest.raises(UserError, match=r"blocks/block-00000.parquet cannot be read: No such file"):
        open_exemplars(store.url).read(0)
    with pytest.raises(UserError, match=r"^nowhere://x cannot be read: Protocol not known"):
        open_exemplars("nowhere://x")


def test_store_knows_the_splits_of_the_package():
    assert exemplar_store.SPLITS == SPLITS


def test_a_text_at_which_the_target_raises_is_left_out_with_a_reason(scanner, tmp_path):
    config = collect_config(tmp_path, [*TEXTS[:9], "zzz"])
    plan = plan_collection(config)
    plan.write_plan(plan.scans)
    tokens = set(scanner.tokenizer("zzz", add_special_tokens=False).input_ids)

    def refuse(_module, arguments):
        if tokens & set(arguments[0].flatten().tolist()):
            raise ValueError("cannot read this")

    hook = scanner.model.get_input_embeddings().register_forward_pre_hook(refuse)
    try:
        info = scan_shard(scanner, config, plan.work, plan.scans[0], "run")
        assert info.failed == [(9, "generation_error", "ValueError: cannot read this")]
        alone = collect_config(tmp_path / "alone", ["zzz", "zzz z"])
        plan = plan_collection(alone)
        plan.write_plan(plan.scans)
        with pytest.raises(ValueError, match="cannot read this"):
            scan_shard(scanner, alone, plan.work, plan.scans[0], "run")
    finally:
        hook.remove()


def test_a_text_that_ends_its_process_twice_is_left_out(scanner, tmp_path):
    config = collect_config(tmp_path, TEXTS[:12], coders=CODERS)
    plan = plan_collection(config)
    plan.write_plan(plan.scans)
    (order,) = plan.scans
    for _ in range(BATCH_DEATHS):
        Attempt(plan.work, order, "run")
    for _ in range(ITEM_DEATHS):  # the process that noted this ended before it noted anything else
        Attempt(plan.work, order, "run").runs_alone("5")
    info = scan_shard(scanner, config, plan.work, order, "run")
    assert info.failed == [(5, "process_died", "2 processes ended while this text ran alone")]
    assert plan.work.size(order.attempts_name) is None
    others = collect_config(tmp_path / "others", TEXTS[:5] + TEXTS[6:12], coders=CODERS)
    assert info.num_tokens == [store.meta.num_tokens for store in collect_here(others, scanner).values()]
