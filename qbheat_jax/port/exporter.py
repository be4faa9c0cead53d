"""Export a workdir to one file: .safetensors and .npz by PyTorch's names, or .stablehlo and .onnx, programs."""

import io
import json
import logging
import os
import pathlib

import numpy as np

from qbheat_jax import api, atomic, pytree
from qbheat_jax import config as config_lib
from qbheat_jax.errors import RUN_FAILED, UserError, writing
from qbheat_jax.models import registry
from qbheat_jax.models.layers import sincos_2d
from qbheat_jax.port import card, files, hf, importer, names, tables
from qbheat_jax.train.config_tables import CLASSIFIER

log = logging.getLogger("qbheat")

ENDINGS = (".safetensors", ".npz", ".stablehlo", ".onnx")


def export(directory, target, *, image_size=0, fold=False, head="keep", layout="", overwrite=False):
    """Write the encoder and classifier of a workdir to `target` atomically, and a model card beside it.

    By PyTorch's names every weight is the checkpoint's, bit for bit.

    Args:
      directory: the workdir.
      target: a path that ends in one of ENDINGS; with a layout a folder, new, empty, or with --overwrite an older one.
      image_size: pixels a side; 0 for the workdir's.
      fold: whether the encoder is folded for that size, see `api.Model.folded`.
      head: "keep" writes the classifier, "drop" leaves it.
      layout: "hf" for a folder that Hugging Face's transformers loads, see `port.hf`.
      overwrite: whether an existing file is replaced.

    Returns:
      Dict of facts: "to", "encoder", "image_size", "tensors", "bytes", "sha256", "parameters", "card".

    Raises:
      UserError: the ending is unknown, the file exists, the encoder cannot be folded, or the disk refuses.
    """
    target = pathlib.Path(target)
    for name, value, accepted in (("head", head, ("keep", "drop")), ("layout", layout, ("", "hf"))):
        if value not in accepted:
            raise UserError(f"--{name} {value}: it takes {' or '.join(filter(None, accepted))}")
    _check_free(target, layout, overwrite)
    model = api.load(directory)
    if head == "drop":
        model = _without_head(model)
    if image_size and image_size != model.config.image_size:
        model = model.sized(image_size)
    if fold:
        model = model.folded()
    facts = {"to": str(target), "encoder": model.config.encoder.name, "image_size": model.config.image_size}
    if layout:
        return facts | _folder(target, model, directory)
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


def _check_free(target, layout, overwrite):
    """Raise UserError for a target that has another kind or that exists."""
    if layout:
        if target.is_file():
            raise UserError(f"--to {target} is a file: --layout {layout} takes a folder")
        if target.is_dir() and any(target.iterdir()) and not (overwrite and (target / "config.json").exists()):
            raise UserError(f"--to {target} already holds something: name a new or empty folder, or pass --overwrite")
        return
    if target.suffix not in ENDINGS:
        raise UserError(f"--to {target}: the name must end in one of {', '.join(ENDINGS)}")
    if target.is_dir():
        raise UserError(f"--to {target} is a directory: name a file")
    if target.exists() and not overwrite:
        raise UserError(f"--to {target} exists: name another file, or pass --overwrite")


def _without_head(model):
    """Return an api.Model of the encoder alone."""
    flat = config_lib.flatten(model.config.to_dict())
    kept = {name: flat[name] for name in CLASSIFIER if name in flat and name not in ("objective", "head.classes")}
    variables = {part: {"encoder": tree["encoder"]} for part, tree in model.variables.items() if "encoder" in tree}
    return api.Model(config_lib.resolve(kept, CLASSIFIER), variables, model.step)


def _folder(target, model, directory):
    """Write a folder of Hugging Face's layout, the weights last; return facts of it."""
    config = hf.config_of(model)
    dialect = f"hf {config['model_type'].removesuffix('_with_registers')}"
    arrays = hf.arrays_of(torch_arrays(model, dialect), config)
    weights = target / hf.WEIGHTS[0]
    with writing(target, RUN_FAILED):
        target.mkdir(parents=True, exist_ok=True)
        for name, content in (("config", config), ("preprocessor_config", hf.preprocessor_of(model))):
            atomic.write(target / f"{name}.json", json.dumps(content, indent=2) + "\n")
        atomic.write(weights, _file(arrays, weights.suffix, model.config))
    facts = {"tensors": len(arrays), "bytes": weights.stat().st_size, "sha256": files.sha256(weights)}
    facts |= {"parameters": card.parameters(model.variables["params"]), "card": str(target / "README.md")}
    rows = _rows(weights, model, directory, facts)
    usage = (
        "```python\nimport transformers\n\n"
        f"model = transformers.{config['architectures'][0]}.from_pretrained({target.name!r})\n```\n\nand here:\n\n```sh\n"
        f"qbheat port --from {target.name} --to DIR{'' if 'id2label' in config else ' --head drop'}\n```"
    )
    front = "---\nlibrary_name: transformers\npipeline_tag: image-feature-extraction\n---\n\n"
    card.write(target / "README.md", front + card.text(target.name, model, rows, usage))
    log.info("wrote %s (%d bytes)", weights, facts["bytes"])
    return facts


def torch_arrays(model, dialect=None):
    """Return {PyTorch's name: array in PyTorch's layout} of an api.Model's encoder and classifier.

    `dialect`: of the encoder's table; None for that of its release.
    """
    config = model.config
    leaves = {
        path: np.asarray(leaf)
        for path, leaf in pytree.names(model.variables)
        if path.split("/")[1] in ("encoder", "head")
    }
    table = tables.of(config.encoder.name)
    dialect = table.own_dialect(model.encoder) if dialect is None else dialect
    named, arrays = table.torch_names(leaves, dialect), {}
    for path, leaf in leaves.items():
        arrays |= names.taken_apart(path, leaf, named[path])
    return {name: np.ascontiguousarray(array) for name, array in {**arrays, **_fixed(model, dialect)}.items()}


def _fixed(model, dialect):
    """Return {PyTorch's name: array} of what a ViT computes and PyTorch stores; {} for other encoders.

    It is the table of a fixed position code and, in DINOv3's names, the periods of the rotary code and the masks of biases.
    """
    config, encoder = model.config, model.encoder
    position, width = getattr(encoder, "position", ""), encoder.width
    if position == "rope" and not dialect.startswith("hf "):
        quarter = width // encoder.heads // 4
        mask = np.repeat(np.float32([1, 0, 1]), width)
        periods = {"rope_embed.periods": np.float32(encoder.rope_theta ** (np.arange(quarter) / quarter))}
        return periods | {f"blocks.{n}.attn.qkv.bias_mask": mask for n in range(encoder.depth)}
    if position != "sincos":
        return {}
    cells = config.image_size // encoder.stride
    code = sincos_2d(cells, cells, width).reshape(1, cells * cells, width)
    extra = np.zeros((1, int(encoder.class_token), width), np.float32)
    log.info("the fixed position code is written as a table, for images of %d pixels", config.image_size)
    (name,) = tables.of(config.encoder.name).torch_names(["params/encoder/pos_embed"], dialect).values()
    return {name: np.concatenate([extra, code], 1)}


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
    card.write(path, card.text(target.name, model, _rows(target, model, directory, facts), _usage(target, model)))
    return path


def _rows(file, model, directory, facts):
    return [
        *_origin(pathlib.Path(directory)),
        ("exported from", f"{os.path.basename(os.path.normpath(directory))}, checkpoint {model.step}"),
        ("file", f"`{file.name}`, {facts['bytes']:,} bytes, SHA-256 `{facts['sha256']}`"),
    ]


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
