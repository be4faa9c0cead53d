"""A checkpoint in parts is read through its index; a part alone is refused and names the index."""

import json

import numpy as np
import pytest
import safetensors.numpy

import qbheat_jax
from qbheat_jax import port, pytree
from qbheat_jax.errors import UserError
from qbheat_jax.port import files, shards
from tests.test_port_workdir import state_dict


@pytest.fixture(scope="module")
def arrays():
    return state_dict("micro")


def split(folder, arrays, stem="model", ending=".safetensors", save=None, index=True):
    """Two parts and their index, as transformers names them -> the index's path."""
    save = save or (lambda part, path: path.write_bytes(safetensors.numpy.save(part)))
    names = sorted(arrays)
    places = {name: f"{stem}-0000{1 + i % 2}-of-00002{ending}" for i, name in enumerate(names)}
    for file in set(places.values()):
        save({name: np.ascontiguousarray(arrays[name]) for name in names if places[name] == file}, folder / file)
    path = folder / f"{stem}{ending}.index.json"
    if index:
        path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}, indent=2))
    return path


def refused(path):
    with pytest.raises(UserError) as caught:
        files.read(path)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    return str(caught.value)


def test_parts_are_read_through_their_index(tmp_path, arrays):
    index = split(tmp_path, arrays)
    tree, kind = files.read(index)
    assert kind == "safetensors, 2 parts by index"
    assert tree.keys() == arrays.keys() and all(np.array_equal(tree[name], arrays[name]) for name in arrays)
    provenance = port.port(index, "micro", tmp_path / "to", classes=10, image_size=32)
    assert provenance["parts"] == {path.name: files.sha256(path) for path in sorted(tmp_path.glob("*.safetensors"))}
    assert provenance == port.port(index, "micro", tmp_path / "to", classes=10, image_size=32)
    model = qbheat_jax.load(tmp_path / "to")
    assert pytree.count(model.variables) == sum(array.size for array in arrays.values())


def test_parts_of_pytorch_too(tmp_path, arrays):
    torch = pytest.importorskip("torch")
    index = split(
        tmp_path, arrays, "pytorch_model", ".bin",
        lambda part, path: torch.save({name: torch.from_numpy(array) for name, array in part.items()}, path),
    )  # fmt: skip
    assert index.name == "pytorch_model.bin.index.json"
    tree, kind = files.read(index)
    assert kind == "PyTorch zip, 2 parts by index" and tree.keys() == arrays.keys()


def test_what_an_index_lists_must_be_there(tmp_path, arrays):
    index = split(tmp_path, arrays)
    second = tmp_path / "model-00002-of-00002.safetensors"
    content = second.read_bytes()
    second.unlink()
    assert "model-00002-of-00002.safetensors is not beside it" in refused(index)
    second.write_bytes(content[:-10])
    assert "model-00002-of-00002.safetensors is truncated" in refused(index)
    second.write_bytes(safetensors.numpy.save({"other": np.ones(1, np.float32)}))
    assert "is in model-00002-of-00002.safetensors, which does not hold it" in refused(index)
    index.write_text('{"weight_map": {"a": "../elsewhere.safetensors"}}')
    assert "../elsewhere.safetensors" in refused(index)
    index.write_text('{"weight_map": {}}')
    assert "no parts" in refused(index)
    index.write_text('{"hidden_size": 768}')
    assert "hidden_size" in refused(index)


def test_a_part_alone_names_its_index(tmp_path, arrays):
    index = split(tmp_path, arrays)
    for number in (1, 2):
        message = refused(tmp_path / f"model-0000{number}-of-00002.safetensors")
        assert f"part {number} of 2" in message and str(index) in message
    (tmp_path / "model-00001-of-00001.safetensors").write_bytes(safetensors.numpy.save(arrays))
    assert files.read(tmp_path / "model-00001-of-00001.safetensors")[0].keys() == arrays.keys()


def test_parts_without_an_index_name_it(tmp_path, arrays):
    index = split(tmp_path, arrays, index=False)
    assert index.name in refused(tmp_path / "model-00001-of-00002.safetensors")


def test_other_files_are_no_index(tmp_path, arrays):
    path = tmp_path / "net.safetensors"
    path.write_bytes(safetensors.numpy.save(arrays))
    assert shards.parts(path) == []
