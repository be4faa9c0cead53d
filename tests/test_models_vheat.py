"""vHeat: the activations of the released definition, sizes, shapes, folding, and what training needs of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qbheat_jax import rng
from qbheat_jax.errors import UserError
from qbheat_jax.models import pyramid, registry, vheat
from qbheat_jax.models.heads import PooledHead
from qbheat_jax.models.vheat import Heat2D, HeatBlock, VHeat
from qbheat_jax.tools.preflight import compile as compile_lib
from qbheat_jax.train import optim, state
from tests import heat_nets

NAMES = ("vheat_pre", "vheat_post")
# The same branches in other pairs.
PAIRS = tuple(pytest.param(name, marks=pytest.mark.weekly) for name in ("vheat_post_noscale", "vheat_pre_scale"))
RANDOM = np.random.default_rng(0)
TINY = {"dims": (8, 12, 16, 24), "depths": (1, 2, 1, 1), "layer_scale": True}
TWO = {"dims": (8, 12), "depths": (1, 1)}  # stages: what compiles sooner
net = functools.cache(heat_nets.vheat)


def close(ours, known, error, name=""):
    np.testing.assert_allclose(ours, known, rtol=0, atol=error, err_msg=name)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def initial(encoder, size):
    return jax.eval_shape(lambda: encoder.init_with_output(jax.random.key(0), jnp.zeros((1, size, size, 3))))


# --- Against known activations ---------------------------------------------------------------------------------------


def logits_of(head, features):
    return PooledHead(10).apply({"params": head}, features, {})


@pytest.mark.parametrize("name", [*NAMES, *PAIRS])
def test_every_known_activation_in_both_forms_and_in_bfloat16(name):
    encoder, params, head, known = net(name)
    size = encoder.image_size

    @jax.jit
    def forward(params, images):
        (features, out), kept = encoder.apply({"params": params}, images, capture_intermediates=True)
        folded = encoder.fold(params, size)
        in_short = encoder.clone(**folded.options).apply({"params": folded.params}, images)
        low = encoder.clone(dtype=jnp.bfloat16).apply({"params": params}, images)
        return features, out, kept["intermediates"], folded.params, in_short, low

    features, out, kept, folded, (features_in_short, out_in_short), (low, low_out) = forward(params, known["input"])
    close(out["stem"], known["stem"], 2e-4)
    for n, depth in enumerate(encoder.depths):
        for j in range(depth):
            block = kept[f"layers_{n}_{j}"]
            close(block["op"]["__call__"][0], known[f"layers.{n}.{j}.op"], 2e-4, f"heat {n} {j}")
            close(block["__call__"][0], known[f"layers.{n}.{j}"], 2e-4, f"block {n} {j}")
            close(folded[f"layers_{n}_{j}"]["op"]["k_exp"], known[f"layers.{n}.{j}.op.k_exp"], 1e-6)
        close(out[f"stage{n + 1}"], known[f"stage{n + 1}"], 2e-4)
        close(out_in_short[f"stage{n + 1}"], out[f"stage{n + 1}"], 1e-6)
        if n < 3:
            close(kept[f"layers_{n}_{depth}"]["__call__"][0], known[f"down{n + 1}"], 2e-4)
    close(features.mean((1, 2)), known["pooled"], 5e-5)
    close(logits_of(head, features), known["logits"], 1e-5 * np.abs(known["logits"]).max())
    close(logits_of(head, features_in_short), logits_of(head, features), 1e-6)
    assert {x.dtype for x in (low, *low_out.values())} == {jnp.dtype(jnp.bfloat16)}
    # After every branch a norm amplifies the rounding of these random weights; float32 cosines do not change that.
    error = np.square(logits_of(head, low) - known["logits"]).mean() ** 0.5 / known["logits"].std()
    assert error < (8e-2 if encoder.post_norm else 3e-2)


def test_padded_embeddings_for_larger_images():
    encoder, params, head, known = net("vheat_pre")
    encoder = encoder.clone(embedding="padded")
    resized = encoder.resize(params, 96)
    assert resized.options == {"grid": 24} and "96" in resized.notice
    for n in range(4):
        assert np.array_equal(resized.params[f"freq_embed_{n}"], known[f"padded_96.freq_embed.{n}"])

    @jax.jit
    def forward(params, larger, images):
        at_trace_time = encoder.apply({"params": params}, images)[0]
        return at_trace_time, encoder.clone(**resized.options).apply({"params": larger}, images)[0]

    for features in forward(params, resized.params, known["input_96"]):
        close(logits_of(head, features), known["padded_96.logits"], 1e-5 * np.abs(known["padded_96.logits"]).max())


@pytest.mark.parametrize(
    "sizes", [("96x64", "52x76"), pytest.param(("64x64", "40x48"), marks=pytest.mark.weekly)], ids="-".join
)
def test_the_maps_of_the_released_detectors_at_any_size(sizes, monkeypatch):
    encoder, params, _, known = net("vheat_dense", "backbone.", outnorm=True)
    monkeypatch.setattr(vheat, "check_size", lambda *_: None)  # the release has maps of half a cell more

    @jax.jit
    def forward(params, *images):
        return [encoder.apply({"params": params}, x) for x in images]

    for size, (features, out) in zip(sizes, forward(params, *(known[f"input.{size}"] for size in sizes))):
        for n in range(4):
            close(out[f"stage{n + 1}"], known[f"out{n}.{size}"], 2e-4, f"map {n} at {size}")
            embedding = known.get(f"freq_embed.{n}.{size}", params[f"freq_embed_{n}"])
            close(vheat.fit(params[f"freq_embed_{n}"], embedding.shape[:2], "bicubic"), embedding, 5e-6)
        assert np.array_equal(features, out["stage4"])


def test_detectors_get_each_stages_map():
    encoder, images = VHeat(**TINY), jnp.zeros((1, 64, 96, 3))
    given = {}

    def init():
        features, out = encoder.init_with_output(jax.random.key(0), images)[0]
        given.update({name: x.shape for name, x in out.items()})
        return pyramid.maps(features, out, 64, True)

    maps = jax.eval_shape(init)
    assert {stride: x.shape[1:] for stride, x in maps.items()} == {
        4: (16, 24, 8), 8: (8, 12, 12), 16: (4, 6, 16), 32: (2, 3, 24)
    }  # fmt: skip
    assert list(given) == ["stem", "stage1", "stage2", "stage3", "stage4"]  # the last of a stride counts


# --- Sizes and shapes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, parameters, tensors, folded, folded_tensors, at_512",
    [
        ("vheat_t", 30_853_480, 241, 29_558_056, 225, 32_467_584),
        pytest.param("vheat_s", 52_220_392, 505, 50_054_056, 477, 53_834_496, marks=pytest.mark.weekly),
        pytest.param("vheat_b", 92_132_328, 505, 87_498_984, 477, 94_284_800, marks=pytest.mark.weekly),
        pytest.param("vheat_b96", 71_098_792, 665, 68_491_816, 629, None, marks=pytest.mark.weekly),
    ],
)
def test_size_with_the_released_classifier(name, parameters, tensors, folded, folded_tensors, at_512):
    encoder, head = registry.encoder(name), registry.head(name, 1000)
    (features, out), variables = initial(encoder, 32)
    classifier = jax.eval_shape(lambda f: head.init(jax.random.key(0), f, {}), features)
    assert count(variables) + count(classifier) == parameters
    assert len(jax.tree.leaves(variables)) + len(jax.tree.leaves(classifier)) == tensors
    short = jax.eval_shape(lambda params: encoder.fold(params, 224).params, variables["params"])
    assert count(short) + count(classifier) == folded and len(jax.tree.leaves(short)) + 2 == folded_tensors
    own = initial(encoder.clone(folded=True, grid=56), 224)[1]["params"]
    assert jax.tree.map(lambda leaf: leaf.shape, own) == jax.tree.map(lambda leaf: leaf.shape, short)
    larger = initial(encoder.for_images(512), 32)[1]
    last_norm = 2 * encoder.width
    assert at_512 is None or count(larger) - last_norm == at_512


@pytest.mark.parametrize("stride, fields", [(32, {}), (16, {"last_stride": 1}), (8, {"stem_stride": 1})])
def test_strides_have_the_same_weights(stride, fields):
    encoder = VHeat(**TINY, **fields).for_images(64)
    images = jnp.zeros((1, 64, 96, 3))
    (features, out), variables = jax.eval_shape(lambda: encoder.init_with_output(jax.random.key(0), images))
    assert encoder.stride == stride and encoder.image_size == 64
    assert features.shape == (1, 64 // stride, 96 // stride, 24)
    assert out["stage4"].shape == features.shape
    own = initial(VHeat(**TINY, grid=encoder.grid), 32)[1]
    assert jax.tree.map(lambda leaf: leaf.shape, variables) == jax.tree.map(lambda leaf: leaf.shape, own)


@functools.cache
def drawn(encoder, size):
    """Random parameters with diffusivities that matter."""
    shapes = initial(encoder, size)[1]["params"]
    return jax.tree.map(lambda leaf: RANDOM.normal(0, 0.4, leaf.shape).astype(np.float32), shapes)


def test_any_size_any_sides_and_one_cell():
    encoder = VHeat(**TWO, grid=8)
    params = drawn(encoder, 32)
    sizes = ((32, 32), (16, 24), (8, 8))

    @jax.jit
    def forward(params):
        images = [jax.random.normal(jax.random.key(0), (2, *size, 3)) for size in sizes]
        return [encoder.apply({"params": params}, x)[0] for x in images]

    for (height, width), features in zip(sizes, forward(params)):
        assert features.shape == (2, height // 8, width // 8, 12)
        assert np.isfinite(features).all() and np.abs(features[0] - features[1]).max() > 1e-3
    with pytest.raises(ValueError):
        encoder.apply({"params": params}, jnp.zeros((1, 36, 32, 3)))


def test_embeddings_follow_the_images_of_a_run():
    encoder = VHeat(**TINY)
    assert (encoder.image_size, encoder.for_images(96).image_size, encoder.one_size) == (224, 96, False)
    assert VHeat(**TINY, grid=8).for_images(96).image_size == 32  # an option is kept
    assert VHeat(**TINY, stem_stride=1).for_images(32).grid == 32
    params = drawn(encoder.for_images(96), 32)
    assert [params[f"freq_embed_{n}"].shape[0] for n in range(4)] == [24, 12, 6, 3]
    resized = encoder.for_images(96).resize(params, 64)
    assert resized.options == {"grid": 16}
    assert [resized.params[f"freq_embed_{n}"].shape[0] for n in range(4)] == [16, 8, 4, 2]
    assert encoder.for_images(96).resize(params, 96).params is params


def test_a_smaller_map_drops_the_padded_modes():
    table = np.arange(12, dtype=np.float32).reshape(3, 4, 1)
    fitted = np.asarray(vheat.fit(table, (2, 5), "padded"))
    assert np.array_equal(fitted[:, :4], table[:2]) and not fitted[:, 4].any()


# --- Folding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"last_stride": 1}])
def test_folding_for_another_size_than_the_embeddings(fields):
    encoder = VHeat(**TWO, grid=8, **fields)
    params, images = drawn(encoder, 32), RANDOM.normal(size=(1, 64, 64, 3)).astype(np.float32)
    folded = encoder.fold(params, 64)
    short = encoder.clone(**folded.options)
    assert short.image_size == short.least_size == 64 and short.one_size

    @jax.jit
    def both(params, folded):
        return encoder.apply({"params": params}, images)[0], short.apply({"params": folded}, images)[0]

    long, short_features = both(params, folded.params)
    close(short_features, long, 1e-6 * np.abs(long).max())
    assert short.fold(folded.params, 64).params is folded.params
    assert not any(name.startswith("freq_embed") for name in folded.params)


def test_what_a_folded_encoder_refuses():
    encoder = VHeat(**TINY, grid=8)
    folded = encoder.fold(drawn(encoder, 32), 32)
    short, variables = encoder.clone(**folded.options), {"params": folded.params}
    for call in (
        lambda: short.apply(variables, jnp.zeros((1, 64, 32, 3))),
        lambda: short.apply(variables, jnp.zeros((1, 32, 32, 3)), True),
        lambda: short.resize(folded.params, 64),
        lambda: initial(VHeat(**TINY, embedding="linear"), 32),
    ):
        with pytest.raises(UserError) as caught:
            call()
        assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


# --- Training --------------------------------------------------------------------------------------------------------


def test_initial_statistics():
    channels, side = 96, 28
    table = 0.02 * jax.random.normal(jax.random.key(1), (side, side, channels))
    block, images = HeatBlock(layer_scale=True), jnp.zeros((1, side, side, channels))
    params = jax.jit(lambda key: block.init(key, images, table, False))(jax.random.key(0))["params"]
    for name in ("linear", "out_linear", "to_k"):
        kernel, bias = params["op"][name]["kernel"], params["op"][name]["bias"]
        assert abs(float(kernel.std()) - 0.02) < 1e-3 and float(jnp.abs(kernel).max()) > 0.055 and not bias.any()
    for layer, fan_in in ((params["op"]["dwconv"], 9), (params["mlp"]["fc1"], 96), (params["mlp"]["fc2"], 384)):
        for leaf in layer.values():
            assert 0.93 * fan_in**-0.5 < float(jnp.abs(leaf).max()) <= fan_in**-0.5
            assert abs(float(leaf.std()) - (3 * fan_in) ** -0.5) < 0.15 * fan_in**-0.5
    assert {float(x) for x in np.unique(params["gamma1"])} == {np.float32(1e-5)}
    k = np.asarray(jax.nn.relu(table @ params["op"]["to_k"]["kernel"]))
    assert abs(k.mean() - 0.0016) < 1e-4 and abs((k == 0).mean() - 0.5) < 0.02 and 0.015 < k.max() < 0.05
    factors = Heat2D(channels).apply({"params": params["op"]}, table, method="decay")
    assert factors.dtype == jnp.float32 and float(factors[0, 0].min()) == 1.0 and 0.6 < float(factors.min()) < 1.0


def test_initial_embeddings():
    encoder, images = VHeat(dims=(32, 64), depths=(1, 1), grid=32), RANDOM.normal(size=(2, 32, 32, 3))

    @jax.jit
    def init(key):
        (features, _), variables = encoder.init_with_output(key, images)
        return variables["params"], features, encoder.clone(dtype=jnp.bfloat16).apply(variables, images)[0]

    params, features, low = init(jax.random.key(0))
    close(low, features, 2e-2 * np.abs(features).max())
    assert abs(float(params["freq_embed_0"].std()) - 0.02) < 5e-4
    stem = params["patch_embed"]["conv1"]
    assert float(jnp.abs(stem["kernel"]).max()) <= 27**-0.5 and float(jnp.abs(stem["bias"]).max()) > 0
    assert "bias" not in params["layers_0_1"]["conv"]


def test_training_in_bfloat16():
    encoder = VHeat(**TWO, drop_path=0.5, dtype=jnp.bfloat16, grid=8, remat="nothing_saveable")
    params, images = drawn(encoder, 32), RANDOM.normal(size=(4, 32, 32, 3)).astype(np.float32)

    @jax.jit
    def step(params):
        def loss(params):
            features, _ = encoder.apply({"params": params}, images, True, rngs={"drop_path": jax.random.key(2)})
            return jnp.square(features.astype(jnp.float32)).mean(), features

        (_, features), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        return features, gradient, encoder.apply({"params": params}, images)[0]

    features, gradient, evaluated = step(params)
    assert features.dtype == jnp.bfloat16 and np.isfinite(np.float32(features)).all()
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.float32)}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert all(np.abs(gradient[f"freq_embed_{n}"]).max() > 0 for n in range(2))
    assert np.abs(np.float32(features) - np.float32(evaluated)).max() > 0.1  # drop path is off in evaluation


def test_layers_are_ordered_from_the_head():
    encoder = VHeat(**TINY, outnorm=True)
    order = [
        ("patch_embed/conv1/kernel", 6), ("freq_embed_0", 5), ("layers_0_0/gamma1", 5), ("layers_0_1/conv/kernel", 4),
        ("freq_embed_1", 4), ("layers_1_0/op/to_k/bias", 4), ("layers_1_1/mlp/fc1/kernel", 3), ("outnorm0/scale", 4),
        ("layers_1_2/norm/scale", 2), ("layers_3_0/norm1/bias", 1), ("outnorm3/scale", 0), ("norm/scale", 0),
    ]  # fmt: skip
    assert [(name, encoder.layer_of(name)) for name, _ in order] == order


@pytest.mark.parametrize(
    "objective, fields",
    [
        ("qbheat", {}),
        pytest.param("moco", {"moco.queue": 64}, marks=pytest.mark.weekly),
        pytest.param("simmim", {}, marks=pytest.mark.weekly),
        pytest.param("supervised", {"head.classes": 4}, marks=pytest.mark.weekly),
    ],
)
def test_every_parameter_learns_under_every_method(small_config, monkeypatch, objective, fields):
    entry = registry.Entry(VHeat, {**TWO, "post_norm": True, "layer_scale": True}, {8: {}}, registry._VHEAT)
    monkeypatch.setitem(registry.ENCODERS, "vheat_micro", entry)
    given = {"encoder.name": "vheat_micro", "objective": objective, "ema": 0.0, "decoder.depth": 0}
    config = small_config({**given, **fields})
    step = compile_lib.build(config, jax.devices()[:1])
    optimizer = optim.optimizer(config, lambda step: 1e-3)
    started, _ = state.create(step.objective, optimizer, step.batch, rng.root(0), step.mesh)
    before = jax.tree.map(np.array, started.params["encoder"])  # copies, since the step donates its state
    highest = {"image": 256, "mask": 2, "label": 4, "quarter": 1}  # of the quarters only some placements are trained
    batch = {
        name: jnp.asarray(RANDOM.integers(0, highest.get(name, 256), x.shape), x.dtype)
        for name, x in step.batch.items()
    }
    for _ in range(3):
        started, metrics = step.function(started, batch)
    assert np.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0
    moved = jax.tree.map(lambda a, b: bool((a != np.asarray(b)).any()), before, started.params["encoder"])
    assert all(jax.tree.leaves(moved)), moved
