"""Which model and which artifacts a dataset is about, told apart without reading them whole."""

from __future__ import annotations

import hashlib
from pathlib import Path

from introspect_ray.config import ModelConfig
from introspect_ray.data.manifest import TargetIdentity
from introspect_ray.models.paths import check_model, resolve_model_path

_SAMPLE_BYTES = 1 << 20


def identify_target(config: ModelConfig) -> TargetIdentity:
    """Which model `config` names, without reading it whole. Raises UserError if it names none."""
    found = check_model(config)
    text = found.get_text_config(decoder=True)
    folder = Path(resolve_model_path(config.path))
    return TargetIdentity(
        path=config.path,
        revision=getattr(found, "_commit_hash", None) or config.revision,
        width=text.hidden_size,
        num_layers=text.num_hidden_layers,
        digest=folder_digest(folder) if folder.is_dir() else "",
    )


def folder_digest(folder: Path) -> str:
    """32 hex digits over name, size, first and last MiB of every file: cheap, and different after any training."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".model", ".bin")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLE_BYTES))
            file.seek(max(0, size - _SAMPLE_BYTES))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
