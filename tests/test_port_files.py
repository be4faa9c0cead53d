"""Every kind of file of weights is read as it is; everything else is refused in a sentence, and nothing in it is run."""

import argparse
import os
import pickle
import sys
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from qbheat_jax.errors import UserError
from qbheat_jax.port import files

ARRAYS = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a.half": np.float16([0.1, -2.5]),
    "a.count": np.array(7),
    "big": np.random.default_rng(0).normal(size=(64, 65)).astype(np.float32),
}


class Code:
    """Unpickled, it runs a command that makes a file."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def refused(path):
    with pytest.raises(UserError) as caught:
        files.read(path)
    assert path.name in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def same(tree, arrays=ARRAYS):
    return tree.keys() == arrays.keys() and all(
        np.array_equal(tree[name], array) and tree[name].dtype == array.dtype for name, array in arrays.items()
    )


# --- Without PyTorch -------------------------------------------------------------------------------------------------


@pytest.fixture
def no_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)


def test_safetensors_and_npz_are_read_without_pytorch_whatever_they_are_called(tmp_path, no_torch):
    arrays = {**ARRAYS, "brain": np.float32([1.5, -2]).astype(ml_dtypes.bfloat16)}
    path = tmp_path / "weights.bin"
    path.write_bytes(safetensors.numpy.save(arrays))
    tree, kind = files.read(path)
    assert kind == "safetensors" and same(tree, arrays)
    np.savez(tmp_path / "weights.npz", **ARRAYS)
    tree, kind = files.read(tmp_path / "weights.npz")
    assert kind == "npz" and same(tree)


def test_files_of_pytorch_say_what_to_install_without_it(tmp_path, no_torch):
    path = tmp_path / "net.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("net/data.pkl", b"")
    assert "pip install 'qbheat_jax[torch]'" in refused(path)


def damaged_in_the_middle(data):
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 255]) + data[len(data) // 2 + 1 :]


def npz_of(tmp_path, **arrays):
    np.savez(tmp_path / "made.npz", **arrays)
    return (tmp_path / "made.npz").read_bytes()


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("empty.pth", lambda _: b"", "is empty"),
        ("text.pth", lambda _: b"lr = 0.1\nsteps = 3\n", "begins with b'lr = 0.1"),
        ("text.safetensors", lambda _: b"these are no tensors", "begins with b'these"),
        ("page.pth", lambda _: b"\n<!DOCTYPE html><html>", "DOCTYPE"),
        ("pointer.pth", lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "git-lfs"),
        ("noise.pth", lambda _: b"\x07\xff\xfe\x80 noise", "begins with b'\\x07\\xff"),
        ("net.pth", lambda _: b"\x1f\x8b\x08 archive", "no file of weights"),
        ("net.h5", lambda _: b"\x89HDF\r\n\x1a\n", "HDF"),
        ("zeros.pth", lambda _: bytes(100), "no file of weights"),
        ("config.json", lambda _: b'{"hidden_size": 3}', "hidden_size"),
        ("array.npz", lambda _: b"\x93NUMPY\x01\x00", "NUMPY"),
        ("cut.safetensors", lambda _: safetensors.numpy.save(ARRAYS)[:-50], "truncated or damaged"),
        ("head.safetensors", lambda _: safetensors.numpy.save(ARRAYS)[:40], "its header is longer than the file"),
        ("cut.npz", lambda p: npz_of(p, **ARRAYS)[:-300], "the end of the archive is missing"),
        ("bit.npz", lambda p: damaged_in_the_middle(npz_of(p, **ARRAYS)), "truncated or damaged"),
        ("objects.npz", lambda p: npz_of(p, a=np.array([Code(p / "canary")], dtype=object)), "can run code"),
        ("plain.pth", lambda p: pickle.dumps(Code(p / "canary")), "a plain pickle, which can run code"),
        ("plain0.pth", lambda p: pickle.dumps(Code(p / "canary"), protocol=0), "no file of weights"),
    ],
)
def test_what_is_no_file_of_weights_is_refused(tmp_path, no_torch, name, content, words):
    (tmp_path / name).write_bytes(content(tmp_path))
    assert words in refused(tmp_path / name)
    assert not (tmp_path / "canary").exists()


def test_paths_that_are_no_files(tmp_path):
    (tmp_path / "net.pth").mkdir()
    assert "is a directory" in refused(tmp_path / "net.pth")
    assert "there is no such file" in refused(tmp_path / "nothing.pth")
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("cat.txt", "cat")
    assert "it holds cat.txt" in refused(tmp_path / "photos.zip")


# --- With PyTorch ----------------------------------------------------------------------------------------------------


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


LEGACY = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


@LEGACY
def test_pytorch_files_keep_their_types_and_what_training_scripts_put_beside(tmp_path, torch, zipped):
    tensors = {name: torch.from_numpy(array.copy()) for name, array in ARRAYS.items()}
    tensors["brain"] = torch.tensor([1.5, -2.0], dtype=torch.bfloat16)
    tensors["learnt"] = torch.nn.Parameter(torch.ones(2, 3).t())
    beside = {"args": argparse.Namespace(lr=0.1), "best": np.float64(76.5), "epoch": 3, "optimizer": {0: [None, "x"]}}
    torch.save({"state_dict": tensors, **beside}, tmp_path / "net", _use_new_zipfile_serialization=zipped)
    tree, kind = files.read(tmp_path / "net")
    assert kind == ("PyTorch zip" if zipped else "PyTorch legacy")
    assert tree["args"].lr == 0.1 and tree["best"] == 76.5 and tree["optimizer"] == {"0": [None, "x"]}
    brain = np.float32([1.5, -2]).astype(ml_dtypes.bfloat16)
    assert same(tree["state_dict"], {**ARRAYS, "brain": brain, "learnt": np.ones((3, 2), np.float32)})


@LEGACY
def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path, torch, zipped):
    path, canary = tmp_path / "net.pth", tmp_path / "canary"
    for content in ({"state_dict": {"a.weight": Code(canary)}}, Code(canary)):
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        message = refused(path)
        assert ".system" in message and "nothing in it was run" in message
    torch.save(Code(canary), path, pickle_protocol=4, _use_new_zipfile_serialization=zipped)
    assert "nothing in it was run" in refused(path)
    assert not canary.exists()
    torch.load(path, weights_only=False)  # the same file does run when it is opened without care
    assert canary.exists()


@LEGACY
def test_a_whole_pickled_model_says_to_save_its_state_dict(tmp_path, torch, zipped):
    torch.save(torch.nn.Sequential(torch.nn.Linear(2, 3)), tmp_path / "net.pth", _use_new_zipfile_serialization=zipped)
    message = refused(tmp_path / "net.pth")
    assert "torch.nn" in message and "save model.state_dict()" in message


@LEGACY
def test_pytorch_files_that_are_cut_or_changed(tmp_path, torch, zipped):
    whole, path = tmp_path / "whole.pth", tmp_path / "net.pth"
    torch.save({"big": torch.from_numpy(ARRAYS["big"])}, whole, _use_new_zipfile_serialization=zipped)
    data = whole.read_bytes()
    for length in (40, 300, len(data) // 2, len(data) - 100):
        path.write_bytes(data[:length])
        assert "damaged" in refused(path), length
    if zipped:  # the legacy format has no sums to tell by
        path.write_bytes(damaged_in_the_middle(data))
        assert "is damaged" in refused(path)


def test_other_things_of_pytorch(tmp_path, torch):
    path = tmp_path / "net.pt"
    torch.save(torch.ones(3), path)
    assert "holds a single tensor" in refused(path)
    torch.save([torch.ones(3)], path)
    assert "holds a list" in refused(path)
    torch.save({"a": torch.ones(3).to_sparse()}, path)
    assert "sparse" in refused(path)
    torch.save({"a": torch.ones(3).to(torch.float8_e4m3fn)}, path)
    assert "float8" in refused(path)
    with zipfile.ZipFile(path, "w") as archive:  # what torch.jit.save writes, as far as it is told by
        for name in ("net/data.pkl", "net/constants.pkl", "net/code/__torch__.py"):
            archive.writestr(name, b"")
    assert "TorchScript" in refused(path)


def test_sums_that_pytorch_was_told_to_leave_out_are_not_missed(tmp_path, torch):
    if not hasattr(torch.serialization, "set_crc32_options"):
        pytest.skip("this PyTorch always writes them")
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"big": torch.from_numpy(ARRAYS["big"])}, tmp_path / "net.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert same(files.read(tmp_path / "net.pth")[0], {"big": ARRAYS["big"]})
