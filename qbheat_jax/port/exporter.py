"""Export a workdir to one file: .safetensors and .npz by PyTorch's names, or .stablehlo and .onnx, programs."""

import io
import json
import logging
import os
import pathlib

import numpy as np

from qbheat_jax import api, atomic, pytree
from qbheat_jax.errors import RUN_FAILED, UserError, writing
from qbheat_jax.models import registry
from qbheat_jax.models.layers import sincos_2d
from qbheat_jax.port import card, files, importer, names, tables

log = logging.getLogger("qbheat")

ENDINGS = (".safetensors", ".npz", ".stablehlo", ".onnx")


def export(directory, target, *, image_size=0, fold=False, overwrite=False):
    """Write the encoder and classifier of a workdir to `target` atomically, and a model card beside it.

    By PyTorch's names every weight is the checkpoint's, bit for bit.

    Args:
      directory: the workdir.
      target: a path that ends in one of ENDINGS.
      image_size: pixels a side; 0 for the workdir's.
      fold: whether the encoder is folded for that size, see `api.Model.folded`.
      overwrite: whether an existing file is replaced.

    Returns:
      Dict of facts: "to", "encoder", "image_size", "tensors", "bytes", "sha256", "parameters", "card".

    Raises:
      UserError: the ending is unknown, the file exists, the encoder cannot be folded, or the disk refuses.
    """
    target = pathlib.Path(target)
    if target.suffix not in ENDINGS:
        raise UserError(f"--to {target}: the name must end in one of {', '.join(ENDINGS)}")
    if target.is_dir():
        raise UserError(f"--to {target} is a directory: name a file")
    if target.exists() and not overwrite:
        raise UserError(f"--to {target} exists: name another file, or pass --overwrite")
    model = api.load(directory)
    if image_size and image_size != model.config.image_size:
        model = model.sized(image_size)
    if fold:
        model = model.folded()
    facts = {"to": str(target), "encoder": model.config.encoder.name, "image_size": model.config.image_size}
    if target.suffix == ".stablehlo":
        from qbheat_jax.port import stablehlo

        data = stablehlo.serialise(model)
    elif target.suffix == ".onnx":
        from qbheat_jax.port import onnx

        data = onnx.serialise(model)
    else:
        arrays = torch_arrays(model)
        facts["tensors"] = len(arrays)
        data = _file(arrays, target.suffix, model.config)
    with writing(target, RUN_FAILED):
        target.parent.mkdir(parents=True, exist_ok=True)
        atomic.write(target, data)
    facts |= {"bytes": target.stat().st_size, "sha256": files.sha256(target)}
    facts["parameters"] = card.parameters(model.variables["params"])
    facts["card"] = str(_card(target, model, directory, facts))
    log.info("wrote %s (%d bytes) and %s", target, facts["bytes"], facts["card"])
    return facts


def torch_arrays(model):
    """Return {PyTorch's name: array in PyTorch's layout} of an api.Model's encoder and classifier."""
    config = model.config
    leaves = {
        path: np.asarray(leaf)
        for path, leaf in pytree.names(model.variables)
        if path.split("/")[1] in ("encoder", "head")
    }
    named = tables.of(config.encoder.name).torch_names(leaves)
    arrays = {named[path]: np.ascontiguousarray(names.to_torch(path, leaf)) for path, leaf in leaves.items()}
    return {**arrays, **_fixed_position(model)}


def _fixed_position(model):
    """Return a ViT's fixed position code as PyTorch's table {"pos_embed": array}; {} for other encoders."""
    config, encoder = model.config, model.encoder
    if getattr(encoder, "position", "") != "sincos":
        return {}
    cells = config.image_size // encoder.stride
    code = sincos_2d(cells, cells, encoder.width).reshape(1, cells * cells, encoder.width)
    extra = np.zeros((1, int(encoder.class_token), encoder.width), np.float32)
    log.info("the fixed position code is written as pos_embed, for images of %d pixels", config.image_size)
    return {"pos_embed": np.concatenate([extra, code], 1)}


def _file(arrays, suffix, config):
    """Return the bytes of a .npz or .safetensors file of {name: array}."""
    if suffix == ".npz":
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        return buffer.getvalue()
    try:
        from safetensors.numpy import save
    except ImportError:
        raise UserError(".safetensors needs the safetensors library: pip install safetensors") from None
    return save(arrays, {"format": "pt", "architecture": config.encoder.name, "image_size": str(config.image_size)})


def _card(target, model, directory, facts):
    path = card.place(target)
    rows = [
        *_origin(pathlib.Path(directory)),
        ("exported from", f"{os.path.basename(os.path.normpath(directory))}, checkpoint {model.step}"),
        ("file", f"`{target.name}`, {facts['bytes']:,} bytes, SHA-256 `{facts['sha256']}`"),
    ]
    card.write(path, card.text(target.name, model, rows, _usage(target, model)))
    return path


def _origin(directory):
    """Return the card's row on the file that a ported workdir was made of."""
    try:
        there = json.loads((directory / "provenance.json").read_text())
        return [("source", f"`{there['source']}`, SHA-256 `{there['sha256']}`")]
    except (OSError, ValueError, LookupError):
        return []


def _usage(target, model):
    name, config = target.name, model.config
    classes = card.classes(config)
    side, kind = config.image_size, "logits" if classes else "features"
    if target.suffix == ".onnx":
        return (
            f"Takes uint8 RGB images [batch, {side}, {side}, 3] and normalises them itself; any batch size:\n\n```python\n"
            f"import onnxruntime\n\nmodel = onnxruntime.InferenceSession({name!r})\n"
            f'({kind},) = model.run(None, {{"images": images}})\n```'
        )
    if target.suffix == ".stablehlo":
        return (
            f"Takes uint8 RGB images [batch, {side}, {side}, 3] and normalises them itself; any batch size, on CPU, CUDA "
            f"and TPU:\n\n```python\nfrom jax import export\n\nmodel = export.deserialize(bytearray(open({name!r}, 'rb')"
            f".read()))\n{kind} = model.call(images)\n```"
        )
    load = f"safetensors.torch.load_file({name!r})"
    if target.suffix == ".npz":
        load = f"{{k: torch.from_numpy(v) for k, v in numpy.load({name!r}).items()}}"
    options = "" if classes else " --head drop"
    options += f" --classes {classes}" if classes not in (0, 1000) else ""
    options += f" --stride {config.encoder.stride}" if config.encoder.stride else ""
    options += f" --image-size {config.image_size}" if config.image_size != importer.IMAGE_SIZE else ""
    options += f" --pixels {config.pixels}" if config.pixels != registry.released_pixels(config.encoder.name) else ""
    return (
        "Names and layouts are PyTorch's. There:\n\n```python\n"
        f"model.load_state_dict({load})\n```\n\nand here:\n\n```sh\n"
        f"qbheat port --arch {config.encoder.name} --from {name} --to DIR{options}\n```"
    )
