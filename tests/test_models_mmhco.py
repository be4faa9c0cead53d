"""MMHCO-HAR: the released program's activations in each mode, exact sizes, and what the fusion must keep."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from qbheat_jax import pytree
from qbheat_jax.models import mmhco, registry
from qbheat_jax.models.mmhco import MMHCO, ClipHead
from qbheat_jax.models.vheat import HeatBlock
from qbheat_jax.port import names, tables

HEAT = pathlib.Path(__file__).parent / "data" / "heat"


def close(ours, known, error, name=""):
    np.testing.assert_allclose(ours, known, rtol=0, atol=error, err_msg=name)


def rows(maps):
    """[B, 2, T, H, W, C] as the fixture has it: [B * 2 * T, C, H, W]."""
    return np.asarray(maps).reshape(-1, *maps.shape[3:]).transpose(0, 3, 1, 2)


@pytest.fixture(scope="module")
def known():
    return load_file(HEAT / "mmhco.activations.safetensors")


@pytest.fixture(scope="module")
def net():
    """(the fixture's encoder as released but for its noise, its head, their variables by our names)."""
    with safe_open(HEAT / "mmhco.state_dict.safetensors", "np") as file:
        c = json.loads(file.metadata()["config"])
    encoder = MMHCO(
        dims=tuple(c["dims"]), depths=tuple(c["depths"]), post_norm=True, layer_scale=True, grid=9, fve_pool="batch"
    )
    head = ClipHead(c["head_classes"])

    def init():
        (features, out), variables = encoder.init_with_output(jax.random.key(0), jnp.zeros((1, 2, 1, 32, 32, 3)))
        return {"encoder": variables, "head": head.init(jax.random.key(0), features, out)}

    shapes = {
        f"{kind}/{part}/{name}": leaf.shape
        for part, tree in jax.eval_shape(init).items()
        for kind, leaves in tree.items()
        for name, leaf in pytree.names(leaves)
    }
    held = load_file(HEAT / "mmhco.state_dict.safetensors")
    wanted = tables.of("mmhco_s").torch_names(shapes)
    assert set(wanted.values()) == {name for name in held if not tables.of("mmhco_s").is_ignored(name)}
    variables = {"encoder": {}, "head": {}}
    for path, shape in shapes.items():
        kind, part, *inner, leaf = path.split("/")
        node = variables[part].setdefault(kind, {})
        for name in inner:
            node = node.setdefault(name, {})
        node[leaf] = names.from_torch(path, held[wanted[path]])
        assert node[leaf].shape == shape
    return encoder, head, variables


@pytest.fixture
def clips(known, monkeypatch):
    """The fixture's input. Its maps have odd sides, which the program takes and our check of whole cells does not."""
    monkeypatch.setattr(mmhco, "check_size", lambda *_: None)
    return jnp.stack([known[m].transpose(0, 1, 3, 4, 2) for m in ("rgb", "event")], 1)


def run(net, clips, train=False, **fields):
    """(logits, outputs, what was sown by path, updated statistics) of the fixture's net with other fields."""
    encoder, head, variables = net
    encoder = encoder.clone(**fields)

    @jax.jit
    def apply(variables, clips):
        kept = ["intermediates", *(["batch_stats"] if train else [])]
        (features, out), updated = encoder.apply(variables["encoder"], clips, train, mutable=kept)
        return head.apply(variables["head"], features, out), out, updated

    logits, out, updated = apply(variables, clips)
    sown = {name.removesuffix("/0"): leaf for name, leaf in pytree.names(updated["intermediates"])}
    return logits, out, sown, updated.get("batch_stats")


def check_embeddings(sown, known, prefix=""):
    for n in range(4):
        for m, modality in enumerate(mmhco.MODALITIES):
            close(
                sown[f"fve{n}/{m}" if f"fve{n}/{m}" in sown else f"fve{n}/0/{m}"][0],
                known[f"{prefix}fve.{modality}.{n}"],
                1e-5,
            )


def test_every_known_activation(net, clips, known):
    logits, out, sown, _ = run(net, clips)
    routes = []
    for i, j in ((0, 0), (1, 0), (1, 1), (2, 0), (3, 0)):
        ours = sown[f"layers_{i}_{j}/op/fusion/router_logits"]
        close(ours, known[f"layers.{i}.{j}.router_logits"], 2e-4)
        np.testing.assert_array_equal(ours.argmax(-1), known[f"layers.{i}.{j}.route"])
        routes.append(ours.argmax(-1))
    assert set(np.concatenate(routes)) == {0, 1, 2}
    for n, last in enumerate((0, 1, 0, 0)):
        close(rows(out[f"stage{n + 1}"]), known[f"layers.{n}.{last}"], 2e-4)
    check_embeddings(sown, known)
    close(out["frames"], known["pooled"], 1e-4)
    close(logits, known["logits"], 1e-5)


def test_the_released_noise_and_draws(net, clips, known, monkeypatch):
    factors = iter([known[f"noise.factor.{m}.{n}"][None] for n in range(4) for m in mmhco.MODALITIES])
    routes = iter([known[f"noise.layers.{i}.{j}.route"] for i, j in ((0, 0), (1, 0), (1, 1), (2, 0), (3, 0))])
    monkeypatch.setattr(mmhco, "noise", lambda *_: next(factors))
    monkeypatch.setattr(mmhco, "route", lambda *_: jax.nn.one_hot(next(routes), 3))
    logits, out, sown, _ = run(net, clips, fve_mode="noise", routing="sampled")
    check_embeddings(sown, known, "noise.")
    close(out["frames"], known["noise.pooled"], 1e-4)
    close(logits, known["noise.logits"], 1e-5)
    assert not list(factors) and not list(routes)


def test_training_normalises_and_keeps_statistics_as_pytorch(net, clips, known):
    logits, _, sown, updated = run(net, clips, train=True, routing="argmax")
    for i, j in ((0, 0), (1, 0), (1, 1), (2, 0), (3, 0)):
        ours = sown[f"layers_{i}_{j}/op/fusion/router_logits"].argmax(-1)
        np.testing.assert_array_equal(ours, known[f"train.layers.{i}.{j}.route"])
    check_embeddings(sown, known, "train.")
    close(logits, known["train.logits"], 2e-5)
    paths = [f"batch_stats/encoder/{name}" for name, _ in pytree.names(updated)]
    wanted = tables.of("mmhco_s").torch_names(paths)
    for path, (_, leaf) in zip(paths, pytree.names(updated)):
        close(leaf, known[f"train.{wanted[path]}"], 1e-4, path)
    assert {f"train.{name}" for name in wanted.values()} == {name for name in known if "running" in name}


# --- Sizes -----------------------------------------------------------------------------------------------------------


def test_sizes_are_the_releases():
    encoder = registry.encoder("mmhco_s")

    def init():
        (features, out), variables = encoder.init_with_output(jax.random.key(0), jnp.zeros((1, 2, 1, 32, 32, 3)))
        heads = [registry.head("mmhco_s", classes).init(jax.random.key(0), features, out) for classes in (300, 114)]
        return variables, [head["params"] for head in heads]

    variables, (hardvs, other) = jax.eval_shape(init)
    params = variables["params"]
    assert set(variables) == {"params", "batch_stats"} and pytree.count(params) == 76_749_768
    assert pytree.count(params) + pytree.count(hardvs) == 76_980_468
    assert pytree.count(params) + pytree.count(other) == 76_837_434

    def part(*words):
        return sum(leaf.size for name, leaf in pytree.names(params) if any(word in name for word in words))

    assert part("freq_conv") == 6_972_672 and part("freq_embed") == 602_112
    assert (part("/router/"), part("/gate"), part("/to_k/")) == (2_529_864, 15_758_208, 3_935_040)
    stored = pytree.names(params) + pytree.names(variables["batch_stats"])
    norms = sum(name.endswith("/mean") for name, _ in stored)
    assert len(stored) + norms == 1089  # PyTorch counts the batches of each batch norm too


# --- Properties ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    """(a small encoder of 16-pixel clips, its variables with large embeddings, two clips)."""
    encoder = MMHCO(dims=(8, 12), depths=(1, 1), stem_stride=2, grid=8)
    clips = jax.random.normal(jax.random.key(1), (2, 2, 3, 16, 16, 3))
    variables = jax.jit(encoder.init)(jax.random.key(0), clips)
    for name in ("freq_embed_rgb", "freq_embed_event"):
        variables["params"][name] *= 2000.0
    return encoder, variables, clips


@functools.cache
def applied(encoder):
    return jax.jit(lambda variables, clips, options: encoder.apply(variables, clips, **options))


def encode(encoder, variables, clips, **options):
    return applied(encoder)(variables, clips, options)


def test_features_are_means_of_the_pooled_vectors(small):
    encoder, variables, clips = small
    features, out = encode(encoder, variables, clips)
    assert features.shape == (2, 4, 4, 12) and out["frames"].shape == (2, 6, 12) and encoder.stride == 4
    assert out["stem"].shape == (2, 2, 3, 8, 8, 8) and out["stage2"].shape == (2, 2, 3, 4, 4, 12)
    close(features.mean((1, 2)), out["frames"].mean(1), 1e-6)


def test_a_clip_does_not_depend_on_its_companions_unless_the_batch_is_pooled(small):
    encoder, variables, clips = small
    other = clips.at[1].multiply(3.0)
    together, changed, turned = (encode(encoder, variables, x)[0] for x in (clips, other, clips[::-1]))
    close(changed[0], together[0], 1e-5)
    close(turned, together[::-1], 1e-5)
    batch = encoder.clone(fve_pool="batch")
    together, changed = (encode(batch, variables, x)[0] for x in (clips, other))
    assert np.abs(changed[0] - together[0]).max() > 3e-5


@pytest.mark.parametrize("mode, routing", [("feature", "gumbel"), ("static", "soft"), ("noise", "sampled")])
def test_evaluation_without_keys_is_deterministic(small, mode, routing):
    encoder, variables, clips = small
    encoder = encoder.clone(fve_mode=mode, routing=routing)
    first, second = (encode(encoder, variables, clips)[0] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    drawn = encode(encoder, variables, clips, rngs={"dropout": jax.random.key(5)})[0]
    assert (np.abs(drawn - first).max() > 0) == (mode == "noise")


def gradients(small, **fields):
    encoder, variables, clips = small
    encoder = encoder.clone(**fields)

    def loss(params):
        rngs = {"dropout": jax.random.key(2)}
        (features, _), _ = encoder.apply(
            {**variables, "params": params}, clips, True, mutable=["batch_stats"], rngs=rngs
        )
        return jnp.square(features).sum() + features[..., 0].sum()

    found = jax.jit(jax.grad(loss))(variables["params"])
    return {name: float(np.abs(leaf).max()) for name, leaf in pytree.names(found)}


@pytest.mark.parametrize(
    "mode", [pytest.param(m, marks=[pytest.mark.weekly] * (m == "static")) for m in mmhco.FVE_MODES]
)
def test_gradients_reach_the_chains_except_in_the_released_mode(small, mode):
    found = gradients(small, fve_mode=mode)
    chains = [size for name, size in found.items() if name.startswith("freq_")]
    assert len(chains) == 8 and (max(chains) == 0 if mode == "noise" else min(chains) > 0)
    assert found["layers_0_0/op/to_k/kernel"] > 0 and found["layers_0_0/op/fusion/router/fc0/kernel"] > 0


def test_a_router_that_always_takes_the_specific_candidate_leaves_vheats_block():
    frames, channels = 2, 8
    block, single = mmhco.FusedBlock(True, True, frames=frames), HeatBlock(True, True)
    x = jax.random.normal(jax.random.key(0), (2 * 2 * frames, 6, 4, channels))
    embedding = jax.random.normal(jax.random.key(1), (1, 2, 1, 6, 4, channels))
    variables = jax.jit(block.init, static_argnums=3)(jax.random.key(2), x, embedding, False)
    params = variables["params"]
    params["op"]["fusion"]["router"]["fc2"]["bias"] = jnp.array([9.0, 0.0, 0.0])
    params["gamma1"] = jnp.ones(channels)
    fused = jax.jit(lambda v: block.apply(v, x, embedding, False))(variables).reshape(2, 2, frames, 6, 4, channels)
    apart = jax.jit(lambda params, x, embedding: single.apply({"params": params}, x, embedding, False))
    alone = {**params, "op": {name: leaf for name, leaf in params["op"].items() if name != "fusion"}}
    for m in range(2):
        rows = x.reshape(2, 2, frames, 6, 4, channels)[:, m].reshape(-1, 6, 4, channels)
        wanted = apart(alone, rows, embedding[0, m, 0])
        close(fused[:, m].reshape(wanted.shape), wanted, 1e-5)


def test_routes():
    logits = jnp.array([[2.0, 0.0, -1.0], [0.0, 0.1, 0.0]])
    np.testing.assert_array_equal(mmhco.route(logits, "argmax"), [[1, 0, 0], [0, 1, 0]])
    np.testing.assert_allclose(mmhco.route(logits, "soft"), jax.nn.softmax(logits), rtol=1e-6)
    many = jnp.tile(logits[:1], (20_000, 1))
    drawn = mmhco.route(many, "gumbel", jax.random.key(0))
    assert set(np.unique(drawn)) == {0.0, 1.0} and set(np.asarray(drawn.sum(-1))) == {1.0}
    close(drawn.mean(0), jax.nn.softmax(logits[0]), 0.02)
    slope = jax.grad(lambda x: mmhco.route(x, "argmax")[0, 0])(logits)
    close(slope, jax.grad(lambda x: jax.nn.softmax(x)[0, 0])(logits), 1e-6)


def test_the_picture_is_the_mean_frame_of_each_modality():
    clips = jnp.arange(2 * 2 * 3 * 4 * 4 * 3, dtype=jnp.uint8).reshape(2, 2, 3, 4, 4, 3)
    encoder = registry.encoder("mmhco_nano")
    whole = encoder.picture(clips)
    assert whole.shape == (2, 4, 4, encoder.picture_channels) and whole.dtype == jnp.uint8
    np.testing.assert_array_equal(whole[..., 3:], jnp.round(clips[:, 1].astype(jnp.float32).mean(1)))
    assert encoder.picture(clips.astype(jnp.float32)).dtype == jnp.float32


def test_embeddings_for_another_size(small):
    encoder, variables, _ = small
    resized = encoder.resize(variables["params"], 32)
    assert resized.options == {"grid": 16} and resized.params["freq_embed_event"].shape == (16, 16, 8)
    larger = encoder.clone(**resized.options)
    features, _ = encode(larger, {**variables, "params": resized.params}, jnp.ones((1, 2, 1, 32, 16, 3)))
    assert features.shape == (1, 8, 4, 12) and np.isfinite(features).all()


def test_layers_are_counted_to_the_head():
    encoder = registry.encoder("mmhco_s")
    depths = {"patch_embed/conv1/kernel": 25, "freq_embed_rgb": 24, "freq_conv1_event/conv/kernel": 22}
    depths |= {"layers_3_1/op/fusion/gate/kernel": 1, "norm/scale": 0, "freq_conv3_rgb/bn/bias": 2}
    assert {name: encoder.layer_of(name) for name in depths} == depths
