"""Pickles of tensors and plain values are read; any other is refused before it does anything."""

import collections
import io
import os
import pickle
import re
import tarfile
from pathlib import Path

import pytest
import torch

import introspect_ray
from introspect_ray.data.pickles import archive_files, read_pickle, read_tensor_file
from introspect_ray.errors import UserError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_tensors_come_back_bit_for_bit(dtype, protocol):
    tensor = (torch.arange(12).reshape(3, 4) - 5).to(dtype)
    found = read_tensor_file("a.pkl", pickle.dumps(tensor, protocol=protocol))
    assert found.dtype == dtype and torch.equal(found, tensor)
    transposed = read_tensor_file("a.pkl", pickle.dumps(tensor.T, protocol=protocol))
    assert torch.equal(transposed, tensor.T)


def test_torch_save_and_plain_values():
    buffer = io.BytesIO()
    torch.save(torch.ones(2, 3), buffer)
    assert torch.equal(read_tensor_file("a.pt", buffer.getvalue()), torch.ones(2, 3))
    plain = [((3, 7), {"chosen_label": "cats", "all_labels": ["cats"], "all_label_scores": {"cats": None}})]
    assert read_pickle("a.pkl", pickle.dumps(plain)) == plain
    with pytest.raises(UserError, match=r"file a.pkl holds list, expected a tensor"):
        read_tensor_file("a.pkl", pickle.dumps(plain))


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def nested(marker):
    """Bytes that torch's own storage loader would unpickle without limits."""
    return Calls(torch.storage._load_from_bytes, pickle.dumps(Calls(os.mkdir, str(marker))))


HOSTILE = {
    "a shell command": (lambda marker: Calls(os.system, f"touch {marker}"), r"asks for (posix|nt).system"),
    "a folder": (lambda marker: Calls(os.mkdir, str(marker)), r"asks for (posix|nt).mkdir"),
    "code": (lambda marker: Calls(eval, f"__import__('os').mkdir({str(marker)!r})"), r"asks for builtins.eval"),
    "a getter": (lambda _: Calls(getattr, "", "join"), r"asks for builtins.getattr"),
    "torch's loader": (lambda _: Calls(torch.load, "a.pt"), r"asks for torch.serialization.load"),
    "bytes inside bytes": (nested, r"cannot be read"),
    "after a good tensor": (lambda marker: [torch.ones(1), Calls(os.mkdir, str(marker))], r"asks for (posix|nt).mkdir"),
    "a class of ours": (lambda _: UserError("x"), r"asks for introspect_ray.errors.UserError"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_is_one_line_and_does_nothing(name, tmp_path):
    build, line = HOSTILE[name]
    marker = tmp_path / "marker"
    content = pickle.dumps(build(marker))
    with pytest.raises(UserError, match=line) as caught:
        read_pickle("bad.pkl", content)
    assert str(caught.value).startswith("pickle bad.pkl ") and not marker.exists()
    buffer = io.BytesIO()
    torch.save(build(marker), buffer)
    with pytest.raises(UserError, match=r"^file bad.pt cannot be read as a tensor"):
        read_tensor_file("bad.pt", buffer.getvalue())
    assert not marker.exists()


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x05", pickle.dumps([1, 2])[:-3], b"\x80\xff.", b"garbage", b"PK\x03\x04"]
)
def test_a_damaged_pickle_is_one_line(content):
    with pytest.raises(UserError, match=r"(pickle|file) a.pkl"):
        read_tensor_file("a.pkl", content)


def test_an_ordered_dict_is_plain():
    assert read_pickle("a.pkl", pickle.dumps(collections.OrderedDict(a=1))) == {"a": 1}


def tar(path, files, mode="w:gz"):
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("link.pkl")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    return path


def test_a_tar_gives_its_plain_files_and_writes_nothing(tmp_path):
    path = tar(tmp_path / "a.tar.gz", {"features/layer_0.pkl": b"one", "x/y.json": b"two"})
    assert list(archive_files(str(path))) == [("features/layer_0.pkl", b"one"), ("x/y.json", b"two")]
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.tar.gz"]
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UserError, match=r"a.tar.gz (is truncated|cannot be read)"):
        list(archive_files(str(path)))
    with pytest.raises(UserError, match="does not exist"):
        list(archive_files(str(tmp_path / "none.tar")))


def test_no_other_module_imports_pickle():
    root = Path(introspect_ray.__file__).parent
    found = [
        str(path.relative_to(root))
        for path in [*root.rglob("*.py"), *(root.parent / "jobs").glob("*.py")]
        if re.search(r"^\s*(import|from) (c?pickle|dill|cloudpickle|joblib)\b", path.read_text(), re.MULTILINE)
    ]
    assert found == ["data/pickles.py"]
