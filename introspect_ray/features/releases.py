"""Coders of the hub by sae-lens' release and id, such as `sae-lens:llama_scope_lxr_8x:l15r_8x`.

sae-lens knows some twenty layouts of published coders. Its loaders read one here, once, with all scales folded in; it
is kept in sae-lens' own layout beside the hub's cache, and read from there as any other folder.
"""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path

from huggingface_hub import constants

from introspect_ray.errors import UserError

RELEASE_PREFIX = "sae-lens:"
_CACHE = "introspect_ray_coders"


def fetch_release(path: str) -> Path:
    """The folder of `sae-lens:RELEASE:ID`; RELEASE is one of sae-lens' list, or a hub repository OWNER/NAME.

    Raises `UserError` if there is no such coder, or if it is neither in the cache nor to be had from the hub.
    """
    release, colon, sae_id = path.removeprefix(RELEASE_PREFIX).partition(":")
    if not (release and colon and sae_id):
        raise UserError(f"SAE path '{path}' is incomplete: expected {RELEASE_PREFIX}RELEASE:ID")
    folder = Path(constants.HF_HOME) / _CACHE / f"{release}:{sae_id}".replace("/", "--")
    if not folder.is_dir():
        _convert(path, release, sae_id, folder)
    return folder


def _convert(path: str, release: str, sae_id: str, folder: Path) -> None:
    """Have sae-lens load it, and write it as `folder`, which is there whole or not at all."""
    from sae_lens import SAE
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    known = get_pretrained_saes_directory()
    if release not in known and "/" not in release:
        raise UserError(f"SAE path '{path}': sae-lens knows no release {release!r}: see its pretrained_saes.yaml")
    if release in known and sae_id not in known[release].saes_map:
        some = ", ".join(list(known[release].saes_map)[:3])
        raise UserError(f"SAE path '{path}': release {release} has no {sae_id!r}: expected one of {some}, ...")
    try:
        # In float32: published scales are folded into weights of 16 bits otherwise, and rounded once more.
        sae = SAE.from_pretrained(release, sae_id, device="cpu", dtype="float32")
    except Exception as error:  # of the hub, of the file system, or of any of the loaders
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"SAE path '{path}' cannot be had from the hub or its cache: {lines[0]}") from error
    temporary = folder.parent / f".tmp-{uuid.uuid4().hex}"
    for parameter in sae.parameters():
        parameter.data = parameter.data.contiguous()  # some loaders leave them transposed, which no file takes
    try:
        sae.save_model(temporary)
        os.replace(temporary, folder)  # noqa: PTH105 - of two that convert at once, one finds the other's
    except OSError as error:
        if not folder.is_dir():
            raise UserError(f"SAE path '{path}' cannot be kept in {folder.parent}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
