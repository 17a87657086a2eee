"""Rows written by some workers and read by another number of them."""

import pytest
import torch
from safetensors.torch import load_file

from introspect_ray.data.storage import Folder
from introspect_ray.training.pieces import DamagedPieces, PieceReader, Rows, index_bytes, write_pieces


def cut(tensor, count):
    """Rows of each of `count` workers, as sharding cuts them: equal shares rounded up, the last ones less or none."""
    size = -(-len(tensor) // count)
    bounds = [(min(n * size, len(tensor)), min((n + 1) * size, len(tensor))) for n in range(count)]
    return [Rows(start, stop, tuple(tensor.shape)) for start, stop in bounds]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("readers", [1, 2, 3, 7])
def test_any_number_of_workers_reads_what_three_wrote(tmp_path, dtype, readers):
    folder = Folder(str(tmp_path))
    whole = {"matrix": torch.randn(7, 3).to(dtype), "vector": torch.randn(4).to(dtype)}
    indices = []
    for rank in range(3):
        own = {name: cut(tensor, 3)[rank] for name, tensor in whole.items()}
        tensors = {name: (whole[name][rows.start : rows.stop].clone(), rows) for name, rows in own.items()}
        indices.append(index_bytes(write_pieces(folder, f"{rank}.safetensors", tensors)))
        assert torch.equal(load_file(tmp_path / f"{rank}.safetensors")["matrix"], tensors["matrix"][0])
    reader = PieceReader(folder, indices)
    for name, tensor in whole.items():
        parts = [reader.read(name, rows) for rows in cut(tensor, readers) if rows.stop > rows.start]
        assert torch.equal(torch.cat(parts), tensor)


def test_rows_that_are_missing_and_other_shapes_are_named(tmp_path):
    folder = Folder(str(tmp_path))
    tensor = torch.randn(6, 2)
    index = index_bytes(write_pieces(folder, "0.safetensors", {"m": (tensor[:4].clone(), Rows(0, 4, (6, 2)))}))
    reader = PieceReader(folder, [index])
    with pytest.raises(DamagedPieces, match="rows 4 to 5 of m are missing"):
        reader.read("m", Rows(2, 6, (6, 2)))
    with pytest.raises(DamagedPieces, match=r"m is of shape \[6, 2\], expected \[6, 3\]"):
        reader.read("m", Rows(0, 2, (6, 3)))
