"""Files that hold something else than a model's weights are refused in one line, and no code of theirs is run."""

import collections
import datetime
import enum
import functools
import os
import pathlib
import pickle
import types
import zipfile

import numpy as np
import pytest

from qbheat_jax import port
from qbheat_jax.errors import UserError
from qbheat_jax.port import files
from tests.test_port_files import LEGACY, Code
from tests.test_port_workdir import state_dict


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def refused(path, **options):
    with pytest.raises(UserError) as caught:
        port.port(path, "micro", path.parent / "to", **{"classes": 10, **options})
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value) and not (path.parent / "to").exists()
    return str(caught.value)


def saved(path, arrays):
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="module")
def micro():
    return state_dict("micro")


@pytest.mark.parametrize(
    "tree",
    [
        {"state": {0: {"step": 3, "exp_avg": 1, "exp_avg_sq": 1}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        {"optimizer": {"state": {"conv1.weight": {"exp_avg": 1, "exp_avg_sq": 1}}}, "epoch": 3},
        {"conv1.weight.exp_avg": 1, "conv1.weight.exp_avg_sq": 1},
    ],
)
def test_an_optimizers_state_is_no_model(tmp_path, torch, tree):
    def tensors(value):
        if isinstance(value, dict):
            return {k: torch.ones(3) if k in ("exp_avg", "exp_avg_sq") else tensors(v) for k, v in value.items()}
        return torch.ones(3) if value == 1 else value

    torch.save(tensors(tree), tmp_path / "optimizer.bin")
    assert "optimizer.bin" in refused(tmp_path / "optimizer.bin")


def test_arrays_that_do_not_fit_are_named(tmp_path, micro):
    bare = {name: array for name, array in micro.items() if ".running_" not in name}
    assert "missing features.0.conv.1.running_mean" in refused(saved(tmp_path / "net.npz", bare))
    head = "classifier.classifier.1.weight"
    assert f"{head} is" in refused(saved(tmp_path / "net.npz", {**micro, head: micro[head].T}))
    empty = {name: np.zeros(0, np.float32) for name in micro}
    assert "is [0], not" in refused(saved(tmp_path / "net.npz", empty))
    for shape in ((), (0,), (10,), (0, micro[head].shape[1])):  # nothing that can be told of the classifier
        message = refused(saved(tmp_path / "net.npz", {**micro, head: np.zeros(shape, np.float32)}))
        assert "--head drop" in message and "--classes 0" not in message


def test_integers_for_weights(tmp_path, micro):
    name = next(iter(micro))
    assert "stored as int8" in refused(saved(tmp_path / "net.npz", {**micro, name: micro[name].astype(np.int8)}))


# --- What a pickle may ask for ---------------------------------------------------------------------------------------


class Stage(enum.Enum):
    FIT = 1


HARMLESS = {
    "path": pathlib.PurePosixPath("a/b.ckpt"),
    "here": pathlib.Path("runs"),
    "windows": pathlib.PureWindowsPath("c:/a"),
    "when": datetime.datetime(2024, 5, 6, tzinfo=datetime.timezone(datetime.timedelta(hours=1))),
    "day": datetime.date(2024, 5, 6),
    "ordered": collections.OrderedDict(a=1),
    "counts": collections.Counter("aab"),
    "lists": collections.defaultdict(list, a=[1]),
    "space": types.SimpleNamespace(lr=0.1),
    "set": {1, 2},
    "array": np.arange(3),
    "columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "names": np.array(["cat", "dog"]),
    "scalar": np.float32(3.5),
    "generator": np.random.RandomState(0).get_state()[1],
}


@LEGACY
@pytest.mark.parametrize("name", HARMLESS)
def test_plain_data_beside_the_weights_is_built(tmp_path, torch, zipped, name):
    tree = {"state_dict": {"a.weight": torch.ones(2)}, "hyper_parameters": {name: HARMLESS[name]}}
    torch.save(tree, tmp_path / "net.ckpt", _use_new_zipfile_serialization=zipped)
    read = files.read(tmp_path / "net.ckpt")[0]
    assert np.array_equal(read["state_dict"]["a.weight"], np.ones(2))
    kept = read["hyper_parameters"][name]
    assert np.array_equal(kept, HARMLESS[name]) if isinstance(kept, np.ndarray) else kept == HARMLESS[name]
    assert not isinstance(kept, pathlib.Path)  # which could reach the disk


class Crafted:
    """Unpickled by numpy, an array or a scalar of objects, whose pointers are the bytes of the file."""

    def __init__(self, kind):
        self.kind = kind

    def __reduce__(self):
        if self.kind == "scalar":
            return np.float64(0).__reduce__()[0], (np.dtype("O"), b"\1" * 8)
        if self.kind == "array":
            function, arguments, _ = np.zeros(1).__reduce__()
            return function, arguments, (1, (1,), np.dtype("O"), False, b"\1" * 8)
        return np.ndarray, ((1,), np.dtype("O"), b"\1" * 8)


@LEGACY
@pytest.mark.parametrize("kind", ["scalar", "array", "buffer"])
def test_no_object_is_made_of_bytes(tmp_path, torch, zipped, kind):
    tree = {"state_dict": {"a": torch.ones(1), "b": Crafted(kind)}}
    torch.save(tree, tmp_path / "net.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError):
        files.read(tmp_path / "net.pth")


def renamed(path, old, new):
    """A PyTorch file with another text in its pickle."""
    with zipfile.ZipFile(path) as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries:
            assert not name.endswith("/data.pkl") or old in content
            archive.writestr(name, content.replace(old, new) if name.endswith("/data.pkl") else content)


@pytest.mark.parametrize("module", [b"pathlib", b"pathlib._local"])
@pytest.mark.parametrize("name", [b"PosixPath", b"WindowsPath", b"PurePosixPath", b"Path"])
def test_paths_of_every_python_and_system_are_built(tmp_path, torch, module, name):
    path = tmp_path / "net.ckpt"
    torch.save({"state_dict": {"a.weight": torch.ones(2)}, "dir": pathlib.PurePosixPath("a/b")}, path)
    renamed(path, b"cpathlib\nPurePosixPath\n", b"c" + module + b"\n" + name + b"\n")
    assert files.read(path)[0]["dir"].parts == ("a", "b")


@LEGACY
@pytest.mark.parametrize("thing", [functools.partial(max, 3), Stage.FIT], ids=["partial", "enum"])
def test_what_may_not_be_built_is_refused(tmp_path, torch, zipped, thing):
    tree = {"state_dict": {"a": torch.ones(1)}, "hyper_parameters": {"thing": thing}}
    torch.save(tree, tmp_path / "last.ckpt", _use_new_zipfile_serialization=zipped)
    message = refused(tmp_path / "last.ckpt")
    assert "last.ckpt" in message and "nothing in it was run" in message and "state_dict()" in message


@LEGACY
@pytest.mark.parametrize("protocol", [2, 4])
def test_code_is_not_run_under_any_protocol(tmp_path, torch, zipped, protocol):
    torch.save(
        {"state_dict": {"a": Code(tmp_path / "canary")}}, tmp_path / "net.pth",
        _use_new_zipfile_serialization=zipped, pickle_protocol=protocol,
    )  # fmt: skip
    assert "nothing in it was run" in refused(tmp_path / "net.pth")
    assert not (tmp_path / "canary").exists()


# --- Files as people have them ---------------------------------------------------------------------------------------


def odd(kind, torch, arrays, folder):
    """A file of these arrays in some odd form -> its path."""
    path, tensors = folder / "net.pth", {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    if kind == "legacy":
        torch.save(tensors, path, _use_new_zipfile_serialization=False)
    elif kind == "half":
        torch.save({name: tensor.half() for name, tensor in tensors.items()}, path)
    elif kind == "double":
        torch.save({name: tensor.double() for name, tensor in tensors.items()}, path)
    elif kind == "counts":
        torch.save({**tensors, "stem.1.num_batches_tracked": torch.tensor(7)}, path)
    elif kind == "parameters":
        torch.save(collections.OrderedDict((n, torch.nn.Parameter(t)) for n, t in tensors.items()), path)
    elif kind == "nested":
        torch.save(
            {"checkpoint": {"backbone": tensors, "head": {"weight": torch.ones(2)}}, "best": np.float64(3)}, path
        )
    elif kind == "numpy":
        torch.save({"state_dict": dict(arrays)}, path)
    elif kind == "views":  # all of one storage, not contiguous
        torch.save({n: torch.stack([t, t], -1)[..., 0] for n, t in tensors.items()}, path)
    elif kind == "no ending":
        path = folder / "net"
        torch.save(tensors, path)
    elif kind == "pth.tar":
        path = folder / "net.pth.tar"
        torch.save({"state_dict": tensors, "arch": "micro", "best_acc1": torch.tensor(3.0)}, path)
    elif kind == "symlink":
        torch.save(tensors, folder / "there.pth")
        path.symlink_to(folder / "there.pth")
    elif kind == "wrong ending":
        path = folder / "net.safetensors"
        torch.save(tensors, path)
    return path


KINDS = "legacy half double counts parameters nested numpy views no_ending pth.tar symlink wrong_ending"


@pytest.mark.parametrize("kind", KINDS.split())
def test_odd_files_of_weights_are_ported(tmp_path, torch, kind, micro):
    path = odd(kind.replace("_", " "), torch, micro, tmp_path)
    provenance = port.port(path, "micro", tmp_path / "to", classes=10)
    assert len(provenance["renamed"]) == len(micro)
    assert provenance["wrappers"] == {"nested": ["checkpoint.backbone."], "numpy": ["state_dict"],
                                      "pth.tar": ["state_dict"]}.get(kind, [])  # fmt: skip


def test_odd_files_that_hold_none(tmp_path, torch, micro):
    torch.save({name: torch.from_numpy(array) for name, array in micro.items()}, tmp_path / "net.pth")
    with zipfile.ZipFile(tmp_path / "net.zip", "w") as archive:
        archive.write(tmp_path / "net.pth", "net.pth")
    assert "unpack it" in refused(tmp_path / "net.zip")
    (tmp_path / "list.pth").write_bytes(pickle.dumps([1]))
    assert "plain pickle" in refused(tmp_path / "list.pth")
    torch.save({"models": [{"a": torch.ones(1)}], "names": ["a"]}, tmp_path / "list.pth")
    assert "models, names" in refused(tmp_path / "list.pth")
    torch.save({}, tmp_path / "list.pth")
    assert "nothing" in refused(tmp_path / "list.pth")
    torch.save({"a": torch.ones(2).to("meta")}, tmp_path / "list.pth")
    assert "meta" in refused(tmp_path / "list.pth")
    os.mkfifo(tmp_path / "pipe.pth")
    assert "no ordinary file" in refused(tmp_path / "pipe.pth")
    assert "no ordinary file" in str(pytest.raises(UserError, files.read, "/dev/zero").value)
    (tmp_path / "gone.pth").symlink_to(tmp_path / "nowhere.pth")
    assert "no such file" in refused(tmp_path / "gone.pth")


def test_a_classifier_beside_the_prefix_is_not_one_below_it(tmp_path, torch, micro):
    head = [name for name in micro if name.startswith("classifier.")]
    arrays = {name if name in head else f"backbone.{name}": array for name, array in micro.items()}
    assert "no classifier below backbone.: pass --head drop" in refused(saved(tmp_path / "net.npz", arrays))
    provenance = port.port(tmp_path / "net.npz", "micro", tmp_path / "to", head="drop")
    assert provenance["wrappers"] == ["backbone."] and set(provenance["dropped"]) == set(head)
