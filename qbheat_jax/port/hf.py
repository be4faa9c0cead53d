"""Hugging Face's layout: a folder of config.json, weights and preprocessor_config.json, on disk or on the hub."""

import json
import logging
import os
import pathlib
import re

import numpy as np

from qbheat_jax.errors import BAD_INPUT, RUN_FAILED, UserError, first_line
from qbheat_jax.models import registry
from qbheat_jax.models.convnext import ConvNeXt
from qbheat_jax.models.layers import gated_width
from qbheat_jax.models.vit import ViT
from qbheat_jax.ops.images import PIXELS

log = logging.getLogger("qbheat")

HUB = "hf:"
# Files of weights in a folder, in order of preference.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_CONFIGS = ("config.json", "preprocessor_config.json")
# timm's names of sizes, which its config.json has as part of the architecture.
_TIMM = (
    re.compile(r"(vit)_(tiny|small|base|large|huge|giant)(_plus)?_patch\d+(_.+|$)"),
    re.compile(r"(convnext)_(tiny|small|base)()(_.+|$)"),
)
_SIZES = {"tiny": "ti", "small": "s", "base": "b", "large": "l", "huge": "h", "giant": "g"}


# --- Where the weights lie -------------------------------------------------------------------------------------------


def locate(source):
    """Return (path of the weights, config.json beside them as a dict or {}) of a file, a folder or `hf:ORG/NAME[@REVISION]`.

    Raises:
      UserError: the folder has no weights, or the hub does not give them.
    """
    if str(source).startswith(HUB):
        folder = pathlib.Path(_download(str(source)))
        return _weights_of(folder, source), _read(folder / "config.json")
    path = pathlib.Path(source)
    if path.is_dir() and (path / "config.json").exists():
        return _weights_of(path, source), _read(path / "config.json")
    return path, _read(path.parent / "config.json")


def _weights_of(folder, source):
    for name in WEIGHTS:
        if (folder / name).exists():
            return folder / name
    raise UserError(f"--from {source} has none of {', '.join(WEIGHTS)}: name a file of weights")


def _read(path):
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) and ("model_type" in config or "architecture" in config) else {}


def _hub(flag):
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(f"{flag} needs the huggingface_hub library: pip install 'qbheat_jax[hf]'") from None
    return huggingface_hub


def _download(source):
    """Return the folder of a model on the hub in its cache, downloaded where it is not there."""
    name, _, revision = source.removeprefix(HUB).partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"--from {source}: it takes hf:ORG/NAME or hf:ORG/NAME@REVISION")
    hub = _hub(f"--from {source}")
    folder = None
    try:
        for weights in ("model*.safetensors*", "pytorch_model*.bin*"):
            folder = hub.snapshot_download(name, revision=revision or None, allow_patterns=[*_CONFIGS, weights])
            if any((pathlib.Path(folder) / file).exists() for file in WEIGHTS):
                break
    except Exception as error:  # of the network, of the hub, or of its cache
        raise UserError(
            f"--from {source} is neither in the cache of huggingface_hub nor can it be downloaded: {first_line(error)}",
            exit_code=RUN_FAILED,
        ) from error
    return folder


# --- config.json read ------------------------------------------------------------------------------------------------


def describe(config):
    """Return (arch, {config field: value} of the encoder) that a config.json describes.

    Raises:
      UserError: it describes no encoder of the registry.
    """
    if "model_type" not in config:
        return _timm(config["architecture"])
    kind = config["model_type"]
    config = config.get("vision_config", config) if kind == "clip" else config
    try:
        if kind == "convnext":
            return _named(kind, ConvNeXt, dims=tuple(config["hidden_sizes"]), depths=tuple(config["depths"])), {}
        if kind in ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit", "clip", "clip_vision_model"):
            return _vit(kind, config)
    except KeyError as error:
        raise UserError(f"config.json of a {kind} lacks {error}") from None
    raise UserError(
        f"config.json is of a {kind}: convnext, vit, dinov2, dinov2_with_registers, dinov3_vit and clip can be read; for "
        "others pass --arch"
    )


def _vit(kind, config):
    width, heads, depth = (config[f] for f in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    gated = config.get("use_swiglu_ffn", config.get("use_gated_mlp", False))
    hidden = config.get("intermediate_size") or int(width * config["mlp_ratio"])
    if "mlp_ratio" in config and gated:
        hidden = gated_width(hidden)
    wanted = "silu" if kind == "dinov3_vit" and gated else "quick_gelu" if kind.startswith("clip") else "gelu"
    if config.get("hidden_act", wanted) != wanted:
        raise UserError(f"config.json has hidden_act={config['hidden_act']!r}: a {kind} of this kind has {wanted!r}")
    arch = _named(kind, ViT, width=width, heads=heads, depth=depth, gated=gated, hidden=hidden)
    options = {"encoder.stride": config["patch_size"], "encoder.norm_eps": config.get("layer_norm_eps", 1e-6)}
    if "layerscale_value" in config:
        options["encoder.layer_scale"] = config["layerscale_value"]
    if kind == "dinov3_vit":
        theta = config.get("rope_theta") or config.get("rope_parameters", {}).get("rope_theta")
        options["encoder.rope_theta"] = float(theta or 100.0)
    return arch, options


def _named(kind, module, **wanted):
    """Return the name of the registry's encoder with these attributes."""
    for name in registry.names():
        if registry.ENCODERS[name].module is module and _attributes(registry.encoder(name), wanted):
            return name
    size = ", ".join(f"{key}={value}" for key, value in wanted.items())
    raise UserError(f"config.json describes a {kind} of {size}, which is no encoder of {', '.join(registry.names())}")


def _attributes(encoder, wanted):
    """Return whether an encoder has these attributes."""
    if isinstance(encoder, ViT):
        hidden, gated = int(encoder.width * encoder.mlp_ratio), encoder.mlp == "swiglu"
        made = {"gated": gated, "hidden": gated_width(hidden) if gated else hidden}
        return all(made.get(key, getattr(encoder, key, None)) == value for key, value in wanted.items())
    return all(getattr(encoder, key) == value for key, value in wanted.items())


def _timm(architecture):
    """Return (arch, {}) of a timm model. The table reads its options from the file."""
    name = architecture.partition(".")[0]
    for pattern in _TIMM:
        if match := pattern.fullmatch(name):
            size = _SIZES[match[2]] if match[1] == "vit" else match[2][0]
            name = f"{match[1]}_{size}{match[3] or ''}"
    if name not in registry.ENCODERS:
        raise UserError(f"config.json has the architecture {architecture!r}, which has no encoder here: pass --arch")
    return name, {}


def pixels(path, config):
    """Return the name in images.PIXELS of the normalisation that is told beside the weights at `path`; "" if none is."""
    told = config.get("pretrained_cfg", {})
    mean, std = told.get("mean"), told.get("std")
    try:
        told = json.loads(path.with_name("preprocessor_config.json").read_text())
        mean, std = told["image_mean"], told["image_std"]
    except (OSError, ValueError, LookupError, TypeError):
        pass
    for name, known in PIXELS.items():
        if mean and std and np.allclose(mean, known.mean, atol=1e-4) and np.allclose(std, known.std, atol=1e-4):
            return name
    if mean:
        log.info("the normalisation %s, %s has no name in images.PIXELS: pass --pixels", mean, std)
    return ""


def classes(config):
    """Return the names of the classifier's outputs in config.json, in order; [] if it has none."""
    names = config.get("id2label") or {}
    return [str(names[key]) for key in sorted(names, key=int)]


# --- The layout written ----------------------------------------------------------------------------------------------


def model_type(encoder):
    """Return the model_type of an encoder. Raise UserError where transformers has no such model."""
    if isinstance(encoder, ConvNeXt):
        if encoder.last_stride == 2:
            return "convnext"
        raise UserError("--layout hf: a convnext of stride 16 has no model in transformers")
    if not isinstance(encoder, ViT):
        raise UserError("--layout hf: it takes a ViT or a ConvNeXt; the weights in PyTorch's names need no layout")
    refused = {"no class_token": not encoder.class_token, "fc_norm": encoder.fc_norm}
    scaled, rope = bool(encoder.layer_scale), encoder.position == "rope"
    if encoder.pre_norm:
        kind = "clip_vision_model"
        refused |= {"layer_scale": scaled, "registers": encoder.registers, "rope": rope}
    elif rope:
        kind, refused["no layer_scale"] = "dinov3_vit", not scaled
    elif scaled:
        kind = "dinov2_with_registers" if encoder.registers else "dinov2"
    else:
        kind = "vit"
        refused |= {"registers": encoder.registers, "a gated MLP": encoder.mlp == "swiglu"}
    refused["quick_gelu"] = encoder.mlp == "quick_gelu" and not encoder.pre_norm
    for words, true in refused.items():
        if true:
            raise UserError(f"--layout hf: a ViT with {words} has no model in transformers (the nearest is {kind})")
    return kind


_CLASSES = {
    "vit": ("ViTModel", "ViTForImageClassification"),
    "dinov2": ("Dinov2Model", None),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", None),
    "dinov3_vit": ("DINOv3ViTModel", None),
    "clip_vision_model": ("CLIPVisionModel", None),
    "convnext": ("ConvNextModel", "ConvNextForImageClassification"),
}


def config_of(model):
    """Return the config.json of an api.Model. Raise UserError where transformers has no such model."""
    encoder, size = model.encoder, model.config.image_size
    kind, labels = model_type(encoder), _labels(model)
    plain, classifier = _CLASSES[kind]
    if labels and not classifier:
        raise UserError(f"--layout hf: transformers' {kind} has another classifier: pass --head drop")
    config = {"model_type": kind, "architectures": [classifier if labels else plain], "image_size": size}
    config |= {"num_channels": 3, "torch_dtype": "float32"}
    if labels:
        config |= {"id2label": dict(enumerate(labels)), "label2id": {name: n for n, name in enumerate(labels)}}
    if kind == "convnext":
        return config | {
            "hidden_sizes": list(encoder.dims), "depths": list(encoder.depths), "num_stages": len(encoder.dims),
            "patch_size": 4, "hidden_act": "gelu", "layer_norm_eps": 1e-6,
        }  # fmt: skip
    gated, hidden = encoder.mlp == "swiglu", int(encoder.width * encoder.mlp_ratio)
    config |= {
        "hidden_size": encoder.width, "num_hidden_layers": encoder.depth, "num_attention_heads": encoder.heads,
        "patch_size": encoder.patch, "layer_norm_eps": encoder.norm_eps, "hidden_act": "gelu",
    }  # fmt: skip
    if kind.startswith("dinov2"):
        own = {"mlp_ratio": int(encoder.mlp_ratio), "use_swiglu_ffn": gated, "layerscale_value": encoder.layer_scale}
        own |= {"num_register_tokens": encoder.registers} if encoder.registers else {"use_mask_token": False}
        return config | own
    config["intermediate_size"] = gated_width(hidden) if gated else hidden
    if kind == "clip_vision_model":
        return config | {"hidden_act": encoder.mlp}
    if kind == "dinov3_vit":
        config |= {"use_gated_mlp": gated, "layerscale_value": encoder.layer_scale, "rope_theta": encoder.rope_theta}
        config |= {"num_register_tokens": encoder.registers, "query_bias": True, "key_bias": False, "value_bias": True}
        config |= {"hidden_act": "silu" if gated else "gelu"}
    return config


def _labels(model):
    """Return the names of the classifier's outputs; [] without a classifier."""
    if getattr(model.objective, "head", None) is None:
        return []
    return model.class_names or [f"LABEL_{n}" for n in range(model.config.head.classes)]


def arrays_of(arrays, config):
    """Return the arrays of an encoder and classifier as transformers has them: below the encoder's name, with unused tokens."""
    kind, width = config["model_type"], config.get("hidden_size")
    if kind == "dinov2_with_registers":
        arrays = {**arrays, "embeddings.mask_token": np.zeros((1, width), np.float32)}
    if kind == "dinov3_vit":
        arrays = {**arrays, "embeddings.mask_token": np.zeros((1, 1, width), np.float32)}
        arrays.setdefault("embeddings.register_tokens", np.zeros((1, 0, width), np.float32))
    if kind == "clip_vision_model":
        shapes = {"embeddings.class_embedding": (width,), "embeddings.position_embedding.weight": (-1, width)}
        return {name: array.reshape(shapes.get(name, array.shape)) for name, array in arrays.items()}
    if "id2label" in config:
        return {name if name.startswith("classifier.") else f"{kind}.{name}": a for name, a in arrays.items()}
    return arrays


def preprocessor_of(model):
    """Return the preprocessor_config.json of an api.Model: resize, rescale and normalise."""
    size, pixels = model.config.image_size, model.objective.pixels
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True, "size": {"height": size, "width": size}, "resample": 3,
        "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": list(pixels.mean), "image_std": list(pixels.std),
    }  # fmt: skip


# --- The hub ---------------------------------------------------------------------------------------------------------


def push(folder, name, private=False):
    """Upload a folder that `export --layout hf` wrote to the hub as ORG/NAME, and return its address.

    Who may write there is for huggingface_hub's own login to say.

    Raises:
      UserError: the folder is no such folder, the name is none, or the hub refuses.
    """
    folder = pathlib.Path(folder)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"--to {name}: it takes ORG/NAME")
    missing = [file for file in ("config.json", WEIGHTS[0], "README.md") if not (folder / file).is_file()]
    if missing or "model_type" not in _read(folder / "config.json"):
        raise UserError(
            f"--from {folder} is no folder of qbheat export --layout hf: {missing[0] if missing else 'model_type'} is missing",
            exit_code=BAD_INPUT,
        )
    api = _hub("push").HfApi()
    try:
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=os.fspath(folder), commit_message="Upload weights")
    except Exception as error:  # of the network or of the hub
        raise UserError(f"--to {name} was not uploaded: {first_line(error)}", exit_code=RUN_FAILED) from error
    return str(address)
