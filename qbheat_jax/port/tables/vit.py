"""Parameter names of ViT: timm's, which DeiT, MAE and DINOv2 share; DINOv3's; Hugging Face's vit, dinov2, dinov3_vit, clip."""

import math

from qbheat_jax.errors import UserError
from qbheat_jax.models.vit import ViT
from qbheat_jax.port.names import IGNORED, Table

# Names of the position code and of the patches' kernel in the dialects.
POSITIONS = ("pos_embed", "embeddings.position_embeddings", "embeddings.position_embedding.weight")
PATCHES = (
    *("patch_embed.proj.weight", "embeddings.patch_embeddings.projection.weight"),
    *("embeddings.patch_embeddings.weight", "embeddings.patch_embedding.weight"),
)
REGISTERS = ("register_tokens", "storage_tokens", "embeddings.register_tokens")
# One of them is in every file with rotary positions.
ROPE = ("rope_embed.periods", "storage_tokens", "layer.0.attention.q_proj.weight")
CLIP = "pre_layrnorm.weight"


def options(shapes):
    """Return {config field: value} of the encoder in a file: tokens, position code, MLP, gains, norms and patches.

    Args:
      shapes: {parameter name: shape} of the file.

    Raises:
      UserError: the cells of the position code are no square.
    """
    rope = any(name in shapes for name in ROPE)
    found = {"encoder.class_token": _has(shapes, "cls_token", "class_embedding"), "encoder.position": "learnt"}
    if rope:
        found |= {"encoder.position": "rope", "encoder.norm_eps": 1e-5}
    else:
        found["encoder.grid"] = _grid(shapes, found["encoder.class_token"])
    if registers := next((shapes[name][1] for name in REGISTERS if name in shapes), 0):
        found["encoder.registers"] = registers
    if scaled := _has(shapes, "ls1.gamma", "layer_scale1.lambda1"):
        found["encoder.layer_scale"] = 1e-5
    if not rope and not registers and (scaled or POSITIONS[0] not in shapes):
        found["encoder.interpolation"] = "bicubic"
    if _has(shapes, "mlp.w3.weight", "mlp.weights_out.weight", "mlp.gate_proj.weight"):
        found["encoder.mlp"] = "swiglu"
    if CLIP in shapes:
        found |= {"encoder.pre_norm": True, "encoder.mlp": "quick_gelu", "encoder.norm_eps": 1e-5}
    if "fc_norm.weight" in shapes and "norm.weight" not in shapes:
        found["encoder.fc_norm"] = True
    if kernel := next((shapes[name] for name in PATCHES if name in shapes), ()):
        found["encoder.stride"] = kernel[-1]
    return found


def _has(shapes, *endings):
    return any(name.endswith(endings) for name in shapes)


def _grid(shapes, class_token):
    name = next((name for name in POSITIONS if name in shapes), "pos_embed")
    positions = shapes.get(name, (1, 14 * 14 + class_token, 1))
    cells = positions[-2] - class_token if len(positions) > 1 else 0
    grid = math.isqrt(max(0, cells))
    if grid == 0 or grid * grid != cells:
        raise UserError(
            f"{name} {list(positions)} is the position code of {cells} cells: it takes a square number of them"
        )
    return grid


_BLOCK = r"encoder/block(\d+)"


def _release(registers, gated, norm=r"norm"):
    """Return the rules of a release, given its names of registers, of a gated MLP's first layer, and of the last norm."""
    return (
        (r"encoder/class_token", r"cls_token"),
        (r"encoder/registers", registers),
        (r"encoder/pos_embed", r"pos_embed"),
        (r"encoder/patch_embed", r"patch_embed.proj"),
        (rf"{_BLOCK}/norm(\d)", r"blocks.\1.norm\2"),
        (rf"{_BLOCK}/gamma(\d)", r"blocks.\1.ls\2.gamma"),
        (rf"{_BLOCK}/attn/(qkv|proj)", r"blocks.\1.attn.\2"),
        (rf"{_BLOCK}/fc(\d)", r"blocks.\1.mlp.fc\2"),
        (rf"{_BLOCK}/w12", gated),
        (rf"{_BLOCK}/w3", r"blocks.\1.mlp.w3"),
        (r"encoder/pre_norm", r"norm_pre"),
        (r"encoder/norm", norm),
        (r"head/classifier", r"head"),
    )


def _hf(layer, qkv, modules, gated=r"mlp.weights_in", gated_out=r"mlp.weights_out", classifier=r"classifier"):
    """Return the rules of the blocks of a model of Hugging Face.

    Args:
      layer: the name of a block.
      qkv: names of query, key and value below it.
      modules: names of attn/proj, norm1, norm2, fc1 and fc2 below it.
      gated, gated_out: those of a gated MLP; a tuple where its first layer is two.
      classifier: the name of the head.
    """
    ours = ("attn/proj", "norm1", "norm2", "fc1", "fc2")
    gated = tuple(f"{layer}.{name}" for name in gated) if isinstance(gated, tuple) else f"{layer}.{gated}"
    return (
        (rf"{_BLOCK}/attn/qkv", tuple(f"{layer}.{name}" for name in qkv)),
        *((f"{_BLOCK}/{path}", f"{layer}.{name}") for path, name in zip(ours, modules)),
        (rf"{_BLOCK}/gamma(\d)", rf"{layer}.layer_scale\2.lambda1"),
        (rf"{_BLOCK}/w12", gated),
        (rf"{_BLOCK}/w3", f"{layer}.{gated_out}"),
        (r"head/classifier", classifier),
    )


def _embeddings(norm, patches=r"embeddings.patch_embeddings.projection"):
    return (
        (r"encoder/class_token", r"embeddings.cls_token"),
        (r"encoder/registers", r"embeddings.register_tokens"),
        (r"encoder/pos_embed", r"embeddings.position_embeddings"),
        (r"encoder/patch_embed", patches),
        (r"encoder/norm", norm),
    )


_LAYER = r"encoder.layer.\1"
_BERT = tuple(f"attention.attention.{name}" for name in ("query", "key", "value"))
_PROJ = ("q_proj", "k_proj", "v_proj")
_MLP = ("mlp.fc1", "mlp.fc2")


def _dinov3(layer):
    query, key, value = (f"{layer}.attention.{name}" for name in _PROJ)
    modules = ("attention.o_proj", "norm1", "norm2", "mlp.up_proj", "mlp.down_proj")
    return (
        (rf"{_BLOCK}/attn/qkv/bias", (f"{query}.bias", None, f"{value}.bias")),
        *_embeddings(r"norm", r"embeddings.patch_embeddings"),
        *_hf(layer, [f"attention.{n}" for n in _PROJ], modules, ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
    )


_CLIP = (
    (r"encoder/class_token", r"embeddings.class_embedding"),
    (r"encoder/pos_embed", r"embeddings.position_embedding.weight"),
    (r"encoder/patch_embed", r"embeddings.patch_embedding"),
    (r"encoder/pre_norm", r"pre_layrnorm"),
    (r"encoder/norm", r"post_layernorm"),
    *_hf(
        r"encoder.layers.\1",
        [f"self_attn.{name}" for name in _PROJ],
        ("self_attn.out_proj", "layer_norm1", "layer_norm2", *_MLP),
    ),
)
_POOLED, _DINOV3 = "classifier of the mean", "DINOv3"


def own_dialect(encoder):
    """Return the dialect of an encoder's release."""
    return _POOLED if encoder.fc_norm else _DINOV3 if encoder.position == "rope" else ""


def signs(encoder):
    """Return {parameter name: shape} that a file of this encoder must have."""
    last = f"blocks.{encoder.depth - 1}"
    return {f"{last}.attn.qkv.weight": (3 * encoder.width, encoder.width), f"{last}.norm2.weight": (encoder.width,)}


def dialect_signs(encoder):
    """Return the signs of files in Hugging Face's names."""
    width, last = encoder.width, encoder.depth - 1
    layers = {
        f"encoder.layer.{last}.attention.attention.query": f"encoder.layer.{last}.attention.output.dense",
        f"layer.{last}.attention.q_proj": f"layer.{last}.attention.o_proj",
        f"encoder.layers.{last}.self_attn.q_proj": f"encoder.layers.{last}.self_attn.out_proj",
    }
    return tuple({f"{q}.weight": (width, width), f"{o}.weight": (width, width)} for q, o in layers.items())


TABLE = Table(
    module=ViT,
    rules=_release(r"register_tokens", r"blocks.\1.mlp.w12"),
    dialects={
        _POOLED: _release(r"register_tokens", r"blocks.\1.mlp.w12", r"fc_norm"),
        _DINOV3: _release(r"storage_tokens", (r"blocks.\1.mlp.w1", r"blocks.\1.mlp.w2")),
        "hf vit": (
            *_embeddings(r"layernorm"),
            *_hf(
                _LAYER,
                _BERT,
                ("attention.output.dense", "layernorm_before", "layernorm_after", "intermediate.dense", "output.dense"),
            ),
        ),
        "hf dinov2": (
            *_embeddings(r"layernorm"),
            *_hf(_LAYER, _BERT, ("attention.output.dense", "norm1", "norm2", *_MLP)),
        ),
        "hf dinov3_vit": _dinov3(r"layer.\1"),
        "hf clip_vision_model": _CLIP,
    },
    own_dialect=own_dialect,
    head=r"(head|classifier)\.",
    signs=signs,
    dialect_signs=dialect_signs,
    options=options,
    ignored=rf"{IGNORED}|(embeddings\.)?mask_token|rope_embed\.periods|.*\.bias_mask|pooler\.dense\..*"
    r"|text_model\..*|(text|visual)_projection\.weight|logit_scale|.*position_ids",
)
