"""Small models of transformers with random weights, and files that hold them with what they compute.

`python -m tests.hf_models` makes tests/data/hf/NAME.safetensors anew: the weights as `save_pretrained` writes them, their
config.json as metadata, and `input`, `features` and, with a classifier, `logits`. It needs transformers.
"""

import json
import pathlib
import sys
import tempfile

import numpy as np

DATA = pathlib.Path(__file__).parent / "data" / "hf"
KNOWN = ("input", "features", "logits")  # in a file beside the weights

_VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8, "image_size": 24}
_PLAIN = {"intermediate_size": 64}
_DINOV3 = {"num_register_tokens": 2, "image_size": 32}
# {name: (transformers' class, fields of its config, pixels a side of the input)}. Sizes apart from the config's interpolate.
CASES = {
    "vit": ("ViTForImageClassification", {**_VIT, **_PLAIN, "num_labels": 3}, 32),
    "dinov2": ("Dinov2Model", {**_VIT, "use_mask_token": False}, 32),
    "dinov2_registers": ("Dinov2WithRegistersModel", {**_VIT, "use_swiglu_ffn": True, "num_register_tokens": 2}, 16),
    "dinov3": ("DINOv3ViTModel", {**_VIT, **_DINOV3, **_PLAIN}, 32),
    "dinov3_gated": (
        "DINOv3ViTModel",
        {**_VIT, **_DINOV3, "intermediate_size": 64, "use_gated_mlp": True, "hidden_act": "silu", "rope_theta": 50.0},
        24,
    ),
    "clip": ("CLIPVisionModel", {**_VIT, **_PLAIN}, 32),
    "convnext": (
        "ConvNextForImageClassification",
        {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 2, 1], "num_labels": 3},
        64,
    ),
}
# {name: fields of the registry's entry that describes it}.
FIELDS = {"width": 16, "heads": 2, "depth": 2}
ENTRIES = {
    "dinov2_registers": {**FIELDS, "mlp": "swiglu"},
    "dinov3_gated": {**FIELDS, "mlp": "swiglu", "mlp_ratio": 6.0},
    "convnext": {"dims": (8, 8, 16, 16), "depths": (1, 1, 2, 1)},
}


def build(name, seed=1):
    """Return the model of a case in transformers, with random weights that keep activations near 1."""
    import torch
    import transformers

    kind, fields, _ = CASES[name]
    made = getattr(transformers, kind)
    return randomise(made(made.config_class(**fields)), torch.Generator().manual_seed(seed))


def randomise(model, generator):
    """Give a model's parameters random values by their names and shapes; return it, to evaluate."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1 and not name.endswith("bias"):  # gains
                parameter.copy_(1.0 + 0.2 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.1 * noise)
            elif "token" in name or "pos" in name:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise * (2 / parameter[0].numel()) ** 0.5)
    return model.eval()


def compute(model, name, images):
    """Return {"features": [B, h, w, C], "logits"} of a model for normalised images float32 [B, S, S, 3]."""
    import torch

    x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        if name == "convnext":
            maps = model.convnext(x).last_hidden_state.permute(0, 2, 3, 1)
            return {"features": maps.numpy().copy(), "logits": model(x).logits.numpy()}
        body = model.vit if name == "vit" else model
        fit = {"interpolate_pos_encoding": True} if name in ("vit", "clip") else {}
        tokens = body(x, **fit).last_hidden_state
        known = {"logits": model(x, **fit).logits.numpy()} if name == "vit" else {}
        if name == "clip":
            tokens = model.post_layernorm(tokens)
        side = images.shape[1] // CASES[name][1]["patch_size"]
        cells = tokens[:, -side * side :].reshape(len(x), side, side, -1)
        return {"features": cells.numpy().copy(), **known}


def images_for(name):
    """Return normalised images float32 [2, S, S, 3]."""
    side = CASES[name][2]
    return np.random.default_rng(2).normal(size=(2, side, side, 3)).astype(np.float32)


def main():
    from safetensors.numpy import load_file, save_file

    DATA.mkdir(exist_ok=True)
    for name in sys.argv[1:] or CASES:
        model, images = build(name), images_for(name)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            weights = load_file(f"{folder}/model.safetensors")
            config = json.loads(pathlib.Path(folder, "config.json").read_text())
        known = {"input": images, **compute(model, name, images)}
        save_file({**weights, **known}, DATA / f"{name}.safetensors", {"config": json.dumps(config)})


if __name__ == "__main__":
    main()
