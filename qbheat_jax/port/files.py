"""Read files of weights into nested dicts of numpy arrays, without running code in them.

The content decides the format, not the file's name. safetensors and npz need no PyTorch. PyTorch's own files (zip and legacy)
are read by `torch.load(weights_only=True)`, which builds tensors and the plain data of `harmless.CLASSES` alone.
"""

import hashlib
import logging
import pathlib
import pickle
import re
import warnings
import zipfile
import zlib

import ml_dtypes
import numpy as np

from qbheat_jax.errors import UserError, first_line
from qbheat_jax.port import harmless, shards

log = logging.getLogger("qbheat")

# What a file begins with. PyTorch's legacy format is a row of pickles, the first of them this number.
_ZIP = b"PK\x03\x04"
_LEGACY = re.compile(rb"\x80.\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19\.", re.DOTALL)
_PICKLE = re.compile(rb"\x80[\x01-\x05]", re.DOTALL)

_SAFETENSORS = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I64": np.int64, "I32": np.int32,
    "I16": np.int16, "I8": np.int8, "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip

_ADVICE = "save model.state_dict(), a dict of tensors, with torch.save or as .safetensors"


def read(path):
    """Return (tree, format) of a file of weights.

    Returns:
      tree: dict by str of dicts, numpy arrays in their stored types, and whatever else a checkpoint holds.
      format: "safetensors", "npz", "PyTorch zip" or "PyTorch legacy"; of an index file, that of its parts and "index".

    Raises:
      UserError: the file is no whole file of weights.
    """
    path = pathlib.Path(path)
    kind = recognise(path)
    if kind == "index":
        return shards.read(path, _read)
    shards.check_whole(path)
    return _read(path, kind)


def _read(path, kind=None):
    kind = kind or recognise(path)
    reader = {"safetensors": _safetensors, "npz": _npz}.get(kind, _torch)
    tree = reader(path)
    if not isinstance(tree, dict):
        what = "single tensor" if isinstance(tree, np.ndarray) else type(tree).__name__
        raise UserError(f"{path} holds a {what}, not a dict of tensors: {_ADVICE}")
    return tree, kind


def recognise(path):
    """Return the format of a file by its content, or "index". Raise UserError where it is no file of weights."""
    path = pathlib.Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a directory: name the file of weights in it")
    try:
        if path.exists() and not path.is_file():  # a pipe, which can be read once, or a device
            raise UserError(f"{path} is no ordinary file: name one")
        with path.open("rb") as file:
            head, size = file.read(1024), path.stat().st_size
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    if not head:
        raise UserError(f"{path} is empty")
    if head.startswith(_ZIP):
        return _kind_of_zip(path)
    if _LEGACY.match(head):
        return "PyTorch legacy"
    if _PICKLE.match(head):
        raise UserError(
            f"{path} is a plain pickle, which can run code: it was refused, and nothing in it was run; {_ADVICE}"
        )
    if shards.is_index(path, head):
        return "index"
    if head[8:9] == b"{":
        if 8 + int.from_bytes(head[:8], "little") > size:
            raise UserError(f"{path} is truncated, or not a safetensors file: its header is longer than the file")
        return "safetensors"
    raise UserError(
        f"{path} is no file of weights: it begins with {head[:24]!r}; .safetensors, .npz and PyTorch's files are accepted"
    )


def _kind_of_zip(path):
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        raise UserError(f"{path} is truncated or damaged: the end of the archive is missing") from None
    if any(name.endswith("/constants.pkl") for name in names) or any("/code/" in name for name in names):
        raise UserError(f"{path} is a TorchScript archive, a program: {_ADVICE}")
    if any(name.endswith("/data.pkl") for name in names):
        return "PyTorch zip"
    if names and all(name.endswith(".npy") for name in names):
        return "npz"
    raise UserError(
        f"{path} is a zip archive, but neither PyTorch's nor .npz: it holds {', '.join(names[:3]) or 'nothing'}; unpack it "
        "if the weights are in it"
    )


def _safetensors(path):
    try:
        import safetensors
    except ImportError:
        raise UserError(f"{path} needs the safetensors library: pip install safetensors") from None
    try:
        items = safetensors.deserialize(path.read_bytes())
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is truncated or damaged: {error}") from error
    tree = {}
    for name, item in items:
        if item["dtype"] not in _SAFETENSORS:
            raise UserError(f"{path}: {name} is stored as {item['dtype']}; {', '.join(_SAFETENSORS)} can be read")
        tree[name] = np.frombuffer(item["data"], _SAFETENSORS[item["dtype"]]).reshape(item["shape"])
    return tree


def _npz(path):
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except Exception as error:  # numpy, zipfile and zlib each have their own for a damaged member
        if "allow_pickle" in str(error):
            raise UserError(
                f"{path} holds pickled objects, which can run code: it was refused, and nothing in it was run; save arrays "
                "of numbers alone"
            ) from None
        raise UserError(f"{path} is truncated or damaged: {first_line(error, 160)}") from error


def _torch(path):
    try:
        import torch
    except ImportError:
        raise UserError(f"{path} is PyTorch's: reading it needs pip install 'qbheat_jax[torch]'") from None
    if zipfile.is_zipfile(path):
        _check_sums(path)
    try:
        safe, quiet = torch.serialization.safe_globals(harmless.CLASSES), warnings.catch_warnings(action="ignore")
        with safe, quiet, path.open("rb") as file:  # by its name alone it might be taken for another format
            tree = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f" ({asked[1]})" if asked else ""
        raise UserError(
            f"{path} is damaged, or its pickle asks for more than tensors and plain data{what}: it was refused, and nothing "
            f"in it was run; {_ADVICE}"
        ) from error
    except Exception as error:  # RuntimeError, EOFError, and others from a torn pickle
        raise UserError(f"{path} is truncated or damaged: {first_line(error, 160)}") from error
    return _as_numpy(tree, torch, path)


def _check_sums(path):
    """Raise UserError where an archive's CRC-32 sums are wrong. PyTorch does not check them."""

    def sound(archive, name):
        try:
            with archive.open(name) as file:
                while file.read(1 << 20):
                    pass
            return True
        except (zipfile.BadZipFile, zlib.error, OSError):
            return False

    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        damaged = [name for name in names if not sound(archive, name)]
    if 0 < len(damaged) < len(names):  # all are wrong where PyTorch wrote no sums
        raise UserError(f"{path} is damaged: {damaged[0]} in it is not what was written")


def _as_numpy(tree, torch, path):
    if isinstance(tree, dict):
        return {str(key): _as_numpy(value, torch, path) for key, value in tree.items()}
    if isinstance(tree, harmless.Array):
        return tree.array
    if not isinstance(tree, torch.Tensor):
        return tree
    if tree.is_quantized or tree.layout != torch.strided:
        raise UserError(f"{path} holds quantised or sparse tensors: save it in float32 or float16")
    if tree.is_meta:
        raise UserError(f"{path} holds tensors without numbers (of the device meta): save the model after it is loaded")
    try:
        if tree.dtype == torch.bfloat16:
            return tree.detach().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tree.detach().numpy()
    except TypeError:
        raise UserError(f"{path} holds tensors of {tree.dtype}: save it in float32 or float16") from None


def sha256(path):
    """Return the file's SHA-256 in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
