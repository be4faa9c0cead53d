"""The PyTorch encoders compute the same features and steps as ours, which makes their timings comparable."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
from safetensors import safe_open

from qbheat_jax import methods, pytree
from qbheat_jax.models import registry
from qbheat_jax.models.hcnet import HcNet
from qbheat_jax.models.heads import PooledHead
from qbheat_jax.models.mobile_former import MobileFormer, Variant
from qbheat_jax.models.vheat import VHeat
from qbheat_jax.ops import images
from qbheat_jax.tools.bench import encoders, options, peers, training
from qbheat_jax.train import optim
from tests import heat_nets

torch = pytest.importorskip("torch")
from safetensors.torch import load_file  # noqa: E402

from qbheat_jax.tools.bench.peers import running  # noqa: E402

DATA = pathlib.Path(__file__).parent / "data"


@pytest.mark.parametrize("name", ["mobile_former_tiny", "mobile_former_tiny_grouped"])
def test_mobile_former_takes_the_released_names_and_gives_every_known_activation(name):
    path = DATA / f"{name}.state_dict.safetensors"
    with safe_open(path, "np") as file:
        c = json.loads(file.metadata()["config"])
    blocks = tuple(({"DnaBlock": 1, "DnaBlock3": 3}[b[0]], b[1], b[2], b[4], b[5]) for b in c["blocks"])
    variant = Variant(c["stem_chs"], c["token_num"], c["token_dim"], blocks, groups=c["group_num"])
    model = peers.build(MobileFormer(variant)).eval()
    released = {k: v for k, v in load_file(path).items() if not k.startswith("classifier.")}
    own = {k for k in model.state_dict() if not k.startswith("classifier.")}
    assert own == set(released)
    model.load_state_dict(released, strict=False)
    known = load_file(DATA / f"{name}.activations.safetensors")
    with torch.no_grad():
        for n, (maps, tokens) in enumerate(model.blocks(known["input"])):
            assert (maps - known[f"features.{n}.map"]).abs().max() <= 1e-4, n
            assert (tokens.transpose(0, 1) - known[f"features.{n}.tokens"]).abs().max() <= 2e-5, n
    assert n + 1 == len(blocks)


@pytest.mark.parametrize("name", ["hcnet_a", "hcnet_c", "vheat_pre", "vheat_post", "vheat_pre_scale"])
def test_heat_systems_take_the_released_names_and_give_the_known_activations(name):
    path = DATA / f"heat/{name}.state_dict.safetensors"
    if name.startswith("hcnet"):
        with safe_open(path, "np") as file:
            known = json.loads(file.metadata()["config"])
        encoder = HcNet(tuple(known["embed_dim"]), tuple(known["depths"]), name[-1])
    else:
        fields, size = heat_nets.fields(name)
        encoder = VHeat(**fields, grid=size // 4)
    model, known = peers.build(encoder, 10).eval(), load_file(DATA / f"heat/{name}.activations.safetensors")
    released = {key: value for key, value in load_file(path).items() if not key.endswith("mean_num")}
    model.load_state_dict(released)
    with torch.no_grad():
        logits = model(known["input"])
        assert (logits - known["logits"]).abs().max() <= 1e-5 and logits.std() > 0.1
        if name.startswith("hcnet"):
            assert (model.maps(known["input.64x96"]) - known["norm.64x96"]).abs().max() <= 1e-5
            return
        folded = peers.build(encoder.clone(folded=True), 10).eval()
        for n, layers in enumerate(model.layers):
            for j, block in enumerate(layers[: model.depths[n]]):
                released[f"layers.{n}.{j}.op.k_exp"] = block.op.heat.decay(block.op.to_k(model.freq_embed[n]))
        unused = ("to_k.0.weight", "to_k.0.bias")
        folded.load_state_dict(
            {k: v for k, v in released.items() if not k.startswith("freq") and not k.endswith(unused)}
        )
        assert (folded(known["input"]) - logits).abs().max() <= 1e-6


def drawn(shapes):
    """Return random variables. Initial scales of 1 and biases of 0 would hide missing parameters."""
    draw = np.random.default_rng(1)

    def leaf(name, shape):
        scale = 1.0 / np.sqrt(np.prod(shape.shape[:-1])) if len(shape.shape) > 1 else 0.2
        values = scale * draw.normal(size=shape.shape)
        return (np.abs(values) + 0.5 if name.endswith(("scale", "var")) else values).astype(np.float32)

    return pytree.map_with_names(leaf, shapes)


def as_released(name, classes=5, size=32):
    """Return (config, objective) of an encoder with a linear classifier."""
    o = options.Options(batch=4, size=size, classes=classes)
    config = options.supervised(o, name)
    return config, dataclasses.replace(methods.build(config), head=PooledHead(classes))


def shapes_of(config, objective):
    return jax.eval_shape(
        lambda batch: objective.init(jax.random.key(0), batch), methods.batch_spec(config).shapes(config.batch_size)
    )


@pytest.mark.parametrize("name", ["micro", "vit_micro"])
def test_features_are_ours(name):
    config, objective = as_released(name)
    variables = drawn(shapes_of(config, objective))
    inputs = np.random.default_rng(2).normal(size=(4, 32, 32, 3)).astype(np.float32)
    encoder = {kind: tree["encoder"] for kind, tree in variables.items() if "encoder" in tree}
    features = np.asarray(jax.jit(lambda v, x: objective.encoder.apply(v, x)[0])(encoder, inputs))
    model = peers.load(peers.build(objective.encoder, 5), name, variables)
    for way in ("eager", "channels-last"):
        theirs = running.Peer(model, way, 1, "float32", "cpu").forward(inputs)().numpy()
        assert np.abs(features - theirs).max() < 1e-4 * np.abs(theirs).max() and features.std(0).mean() > 1e-2


def test_folded_features_are_those_of_pytorch(monkeypatch):
    fields = {"dims": (8, 12), "depths": (1, 1), "post_norm": True, "layer_scale": True}
    monkeypatch.setitem(registry.ENCODERS, "vheat_micro", registry.Entry(VHeat, fields, {8: {}}, registry._VHEAT))
    config, objective = as_released("vheat_micro")
    variables = drawn(shapes_of(config, objective))
    inputs = np.random.default_rng(2).normal(size=(4, 32, 32, 3)).astype(np.float32)
    folded, constants = encoders._folded(options.Options(size=32), objective, variables)
    assert folded.encoder.folded and "freq_embed_0" not in constants["params"]["encoder"]
    features = np.asarray(jax.jit(folded.encoder.apply)({"params": constants["params"]["encoder"]}, inputs)[0])
    for encoder, v in ((objective.encoder, variables), (folded.encoder, constants)):
        model = peers.load(peers.build(encoder, 5), "vheat_micro", v)
        theirs = running.Peer(model, "channels-last", 1, "float32", "cpu").forward(inputs)().numpy()
        assert np.abs(features - theirs).max() < 1e-4 * np.abs(theirs).max()


def test_the_timed_mobile_former_has_a_counterpart_with_as_many_parameters():
    config, objective = as_released("mobile_former_294m", classes=1000, size=224)
    shapes = shapes_of(config, objective)
    model = peers.load(peers.build(objective.encoder), "mobile_former_294m", drawn(shapes))
    assert sum(p.numel() for p in model.parameters()) == pytree.count(shapes["params"])


def test_training_steps_are_ours():
    """The second loss depends on the gradients, AdamW and its weight decay."""
    config, objective = as_released("vit_micro")
    ours = training.Step(config, objective)
    model = peers.load(peers.build(objective.encoder, 5), "vit_micro", ours.variables())
    rate, betas = optim.peak_learning_rate(config), (config.adam_b1, config.adam_b2)
    peer = running.Peer(model, "channels-last", 1, "float32", "cpu")
    call = peer.step(ours.batch, images.PIXELS[config.pixels], rate, config.weight_decay, betas)
    for _ in range(2):
        assert float(ours.call()) == pytest.approx(float(call()), abs=1e-6)
    after = peers.load(peers.build(objective.encoder, 5), "vit_micro", ours.variables()).state_dict()
    was, moved = model.state_dict(), 0.0
    for name, value in peer.model.state_dict().items():
        apart = (after[name] - value).abs()
        if name.endswith("qkv.bias"):  # the keys' gradient is only rounding error, which Adam scales to whole steps
            apart = torch.cat([apart.chunk(3)[0], apart.chunk(3)[2]])
        assert apart.max() < 0.2 * rate, name
        moved = max(moved, float((value - was[name]).abs().max()))
    assert moved > 1.5 * rate


def test_a_counterpart_with_other_names_is_not_loaded():
    model = peers.build(MobileFormer(Variant(4, 2, 8, ((3, 2, 8, 2, 0),))), 3)
    with pytest.raises(LookupError, match="mobile_former_tiny"):
        peers.load(model, "mobile_former_tiny", {"params": {"encoder": {"tokens": np.zeros((2, 8), np.float32)}}})
