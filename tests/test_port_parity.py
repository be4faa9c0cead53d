"""Ported weights compute what PyTorch computes with them, and go back to it bit for bit."""

import json
import pathlib

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import qbheat_jax
from qbheat_jax import port
from qbheat_jax.models import registry
from qbheat_jax.models.mobile_former import Variant
from qbheat_jax.tools.bench import peers

DATA = pathlib.Path(__file__).parent / "data"


def close(ours, known, error, name=""):
    np.testing.assert_allclose(ours, known, rtol=0, atol=error, err_msg=name)


def forward(model):
    """Jitted: (variables, normalised images) -> (features, the encoder's other outputs, logits)."""

    @jax.jit
    def apply(variables, images):
        encoder, head = (
            {c: tree[part] for c, tree in variables.items() if part in tree} for part in ("encoder", "head")
        )
        features, out = model.encoder.apply(encoder, images)
        return features, out, model.objective.head.apply(head, features, out)

    return apply


# --- Mobile-Former, against the activations of the released definition ------------------------------------------------


@pytest.fixture(params=["mobile_former_tiny", "mobile_former_tiny_grouped"])
def small_net(request, monkeypatch):
    """(registry name, file) of a small net with known activations."""
    path = DATA / f"{request.param}.state_dict.safetensors"
    with safe_open(path, "np") as file:
        c = json.loads(file.metadata()["config"])
    blocks = tuple(({"DnaBlock": 1, "DnaBlock3": 3}[b[0]], b[1], b[2], b[4], b[5]) for b in c["blocks"])
    variant = Variant(c["stem_chs"], c["token_num"], c["token_dim"], blocks, 0, c["num_features"], c["group_num"])
    monkeypatch.setitem(registry.ENCODERS, request.param, registry._mobile_former(variant))
    return request.param, path


def test_mobile_former_gives_every_known_activation(small_net, tmp_path):
    name, path = small_net
    port.port(path, name, tmp_path / "in", classes=10, image_size=32)
    model = qbheat_jax.load(tmp_path / "in")
    known = load_file(DATA / f"{name}.activations.safetensors")
    images = known["input"].transpose(0, 2, 3, 1)
    _, out, logits = forward(model)(model.variables, images)
    blocks = sum(key.endswith(".map") for key in known)
    assert blocks == len(model.encoder.variant.blocks)
    for n in range(blocks):
        maps, tokens = np.asarray(out[f"features_{n}"]), np.asarray(out[f"tokens_{n}"])
        close(maps.transpose(0, 3, 1, 2), known[f"features.{n}.map"], 1e-4, f"map {n}")
        close(tokens.transpose(1, 0, 2), known[f"features.{n}.tokens"], 2e-5, f"tokens {n}")
    close(logits, known["logits"], 2e-5, "logits")

    port.export(tmp_path / "in", tmp_path / "out.safetensors")
    before, after = load_file(path), load_file(tmp_path / "out.safetensors")
    before = {key: value for key, value in before.items() if not key.endswith("num_batches_tracked")}
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)


# --- The others, against PyTorch modules of the released names --------------------------------------------------------

torch = pytest.importorskip("torch")
models = pytest.importorskip("torch_models", reason="needs torch")

NETS = (
    *("resnet18", "resnet50", "mobilenet_v2", "vit_ti"),
    pytest.param("efficientnet_lite0", marks=pytest.mark.weekly),  # test_real_weights.py has it too
)


def peer(name):
    learnt = {"class_token": True, "position": "learnt", "grid": 14} if name == "vit_ti" else {}
    return peers.build(registry.encoder(name, **learnt))


@pytest.mark.parametrize("name", NETS)
def test_parity_with_pytorch_and_back(name, tmp_path):
    net, path = models.randomise(peer(name), seed=1), tmp_path / "net.pth"
    torch.save({"epoch": 90, "state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}}, path)
    port.port(path, name, tmp_path / "in")
    model = qbheat_jax.load(tmp_path / "in")
    apply = forward(model)
    # A ViT resamples its position code to other sizes. Nets of convolutions do not depend on the size.
    for size in ((224, 224), (96, 160)) if name == "vit_ti" else ((96, 160),):
        images = np.random.default_rng(2).normal(size=(2, *size, 3)).astype(np.float32)
        with torch.no_grad():
            images_of_torch = torch.from_numpy(images.transpose(0, 3, 1, 2))
            maps, logits = net.maps(images_of_torch).permute(0, 2, 3, 1).numpy(), net(images_of_torch).numpy()
        assert logits.std() > 1e-2 and np.abs(logits[0] - logits[1]).max() > 1e-2  # they depend on the image
        features, _, ours = apply(model.variables, images)
        close(features, maps, 1e-4 * np.abs(maps).max(), f"features at {size}")
        close(ours, logits, 1e-4 * np.abs(logits).max(), f"logits at {size}")

    from safetensors.torch import load_file as load_torch

    port.export(tmp_path / "in", tmp_path / "net.safetensors")
    fresh = peer(name)
    fresh.load_state_dict(load_torch(tmp_path / "net.safetensors"), strict=True)
    for (name, before), after in zip(net.state_dict().items(), fresh.state_dict().values()):
        assert torch.equal(before, after), name
