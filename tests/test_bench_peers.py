"""The encoders in PyTorch compute what ours compute, so that what is timed against each other is the same."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
from safetensors import safe_open

from qbheat_jax import images, objectives, optim
from qbheat_jax.bench import options, peers, training
from qbheat_jax.models.heads import PooledHead
from qbheat_jax.models.mobile_former import MobileFormer, Variant

torch = pytest.importorskip("torch")
from safetensors.torch import load_file  # noqa: E402

from qbheat_jax.bench.peers import running  # noqa: E402

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


def shaken(variables):
    """Variables away from their beginnings, where gains of 1 and biases of 0 would hide what is left out."""
    draw = np.random.default_rng(1)
    return jax.tree.map(lambda x: (x + 0.2 * np.abs(draw.normal(size=x.shape))).astype(np.float32), variables)


@pytest.mark.parametrize("name", ["micro", "vit_micro"])
def test_features_and_the_first_step_are_ours(name):
    o = options.Options(batch=4, size=32, classes=5)
    config = options.supervised(o, name)
    objective = dataclasses.replace(objectives.build(config), head=PooledHead(o.classes))
    ours = training.Step(config, objective)
    variables, inputs = shaken(ours.variables()), training.normalised(config, ours.batch)
    encoder = {kind: tree["encoder"] for kind, tree in variables.items() if "encoder" in tree}
    features = np.asarray(jax.jit(lambda v, x: objective.encoder.apply(v, x)[0])(encoder, inputs))
    model = peers.load(peers.build(objective.encoder, o.classes), name, variables)
    for way in ("eager", "channels-last"):
        theirs = running.Peer(model, way, 1, "float32", "cpu").forward(inputs)().numpy()
        assert np.abs(features - theirs).max() < 1e-4 * np.abs(theirs).max() and features.std() > 1e-2

    # Two steps: the second loss depends on the gradients and on AdamW. The learning rate is raised so that it shows.
    trained = peers.load(peers.build(objective.encoder, o.classes), name, ours.variables())
    rate, betas = optim.peak_learning_rate(config), (config.adam_b1, config.adam_b2)
    peer = running.Peer(trained, "channels-last", 1, "float32", "cpu")
    call = peer.step(ours.batch, images.PIXELS[config.pixels], rate, config.weight_decay, betas)
    for _ in range(2):
        ours.call()
        assert ours.loss == pytest.approx(float(call()), abs=2e-5)


def test_a_twin_of_other_names_is_not_loaded():
    model = peers.build(MobileFormer(Variant(4, 2, 8, ((3, 2, 8, 2, 0),))), 3)
    with pytest.raises(LookupError, match="other names"):
        peers.load(model, "mobile_former_tiny", {"params": {"encoder": {"tokens": np.zeros((2, 8), np.float32)}}})
