"""Files of features: .npz by numpy, .parquet by pyarrow, .safetensors by safetensors. They are read back alike.

A file holds a row for each image that could be read, in the order of the source: its features, name, label (-1 for none) and
index in the split; and `about`, a dict of where the features come from.
"""

import dataclasses
import json
import os
import zipfile

import numpy as np

from qbheat_jax.errors import UserError

FORMATS = (".npz", ".parquet", ".safetensors")
_EXTRA = "embed"


@dataclasses.dataclass(frozen=True)
class Embeddings:
    """The content of a file.

    Attributes:
      features: float32 or float16 [N, C], or [N, h, w, C] of the cells.
      names: N names of the images.
      labels: int32 [N], -1 for none.
      index: int64 [N], place of each image in its split.
      about: Dict with init, encoder, step, weights, image_size, data, split, class_names and skipped.
    """

    features: np.ndarray
    names: list
    labels: np.ndarray
    index: np.ndarray
    about: dict


def check(path, flag="--to"):
    """Raise UserError where the ending of a path names no format, or the format's package is missing."""
    ending = os.path.splitext(path)[1]
    if ending not in FORMATS:
        raise UserError(f"{flag} {path} is not accepted: it takes a file that ends in {', '.join(FORMATS)}")
    if ending == ".parquet":
        _pyarrow(f"{flag} {path}")


def write(path, parts, shape, dtype, names, labels, index, about):
    """Write a file. `path` is overwritten, and torn if this fails.

    Args:
      path: Its ending, or that of what it will be called, decides the format: see `FORMATS`.
      parts: Iterator over arrays [n, ...] that make up the features; .npz and .parquet are written as they come.
      shape: Shape of all features.
      dtype: "float32" or "float16".
      names, labels, index, about: As of `Embeddings`.
    """
    names = [name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace") for name in names]
    columns = {"labels": np.asarray(labels, np.int32), "index": np.asarray(index, np.int64)}
    writer = {".npz": _write_npz, ".parquet": _write_parquet, ".safetensors": _write_safetensors}
    writer[os.path.splitext(path)[1]](path, parts, shape, np.dtype(dtype), names, columns, about)


def read(path, flag="--among"):
    """Return the `Embeddings` of a file. Raise UserError where it is missing, damaged or not of `write`."""
    check(path, flag)
    reader = {".npz": _read_npz, ".parquet": _read_parquet, ".safetensors": _read_safetensors}
    try:
        return reader[os.path.splitext(path)[1]](path)
    except FileNotFoundError as error:
        raise UserError(f"{flag} {path} is not accepted: there is no such file") from error
    except UserError:
        raise
    except Exception as error:  # each library has errors of its own for a damaged file
        raise UserError(
            f"{flag} {path} is not accepted: it is no file of `qbheat embed`, or damaged ({error})"
        ) from error


# --- .npz ------------------------------------------------------------------------------------------------------------


def _write_npz(path, parts, shape, dtype, names, columns, about):
    columns = {**columns, "names": np.array(names, np.str_), "about": np.array(json.dumps(about))}
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in columns.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
        with archive.open("features.npy", "w", force_zip64=True) as member:
            header = {"descr": dtype.newbyteorder("<").str, "fortran_order": False, "shape": tuple(shape)}
            np.lib.format.write_array_header_1_0(member, header)
            for part in parts:
                member.write(np.ascontiguousarray(part, dtype.newbyteorder("<")).tobytes())


def _read_npz(path):
    with np.load(path, allow_pickle=False) as file:
        about = json.loads(str(file["about"]))
        return Embeddings(file["features"], file["names"].tolist(), file["labels"], file["index"], about)


# --- .safetensors ----------------------------------------------------------------------------------------------------


def _write_safetensors(path, parts, shape, dtype, names, columns, about):
    from safetensors.numpy import save_file

    features, begin = np.empty(shape, dtype), 0
    for part in parts:
        features[begin : begin + len(part)] = part
        begin += len(part)
    save_file({"features": features, **columns}, path, {"names": json.dumps(names), "about": json.dumps(about)})


def _read_safetensors(path):
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        found, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    about, names = json.loads(metadata["about"]), json.loads(metadata["names"])
    return Embeddings(found["features"], names, found["labels"], found["index"], about)


# --- .parquet --------------------------------------------------------------------------------------------------------


def _pyarrow(named):
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{named} needs pyarrow ({error}): pip install 'qbheat_jax[{_EXTRA}]'") from error
    return pyarrow


def _write_parquet(path, parts, shape, dtype, names, columns, about):
    pa, width, classes = _pyarrow(f"--to {path}"), int(np.prod(shape[1:])), about["class_names"]
    schema = pa.schema(
        [
            ("name", pa.string()),
            ("label", pa.int32()),
            ("class", pa.string()),
            ("index", pa.int64()),
            ("features", pa.list_(pa.from_numpy_dtype(dtype), width)),
        ],
        {"about": json.dumps(about), "shape": json.dumps(shape[1:])},
    )
    labels, index, begin = columns["labels"], columns["index"], 0
    with pa.parquet.ParquetWriter(path, schema) as file:
        for part in parts:
            rows = slice(begin, begin + len(part))
            begin += len(part)
            own = [classes[label] if label >= 0 and classes else None for label in labels[rows]]
            flat = pa.array(np.ascontiguousarray(part, dtype).reshape(-1))
            vectors = pa.FixedSizeListArray.from_arrays(flat, width)
            known = pa.array(labels[rows], mask=labels[rows] < 0)
            file.write_table(pa.table([names[rows], known, own, index[rows], vectors], schema=schema))


def _read_parquet(path):
    pa = _pyarrow(f"--among {path}")
    table = pa.parquet.read_table(path).combine_chunks()
    metadata = {
        key.decode(): json.loads(value) for key, value in table.schema.metadata.items() if key != b"ARROW:schema"
    }
    column = table.column("features").combine_chunks()
    vectors = column.values.to_numpy(zero_copy_only=False)
    features = vectors.reshape(len(table), *metadata["shape"])
    labels = table.column("label").fill_null(-1).to_numpy().astype(np.int32)
    return Embeddings(
        features, table.column("name").to_pylist(), labels, table.column("index").to_numpy(), metadata["about"]
    )
