"""HcNet: released sizes, known activations of both generations, its stencils, statistics and initialisation."""

import json
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import qbheat_jax
from qbheat_jax import methods, port
from qbheat_jax.errors import BAD_INPUT, UserError
from qbheat_jax.models import registry
from qbheat_jax.models.hcnet import GroupNorm, HcNet, anisotropic_laplacian, isotropic_laplacian
from qbheat_jax.tools.bench import training

DATA = pathlib.Path(__file__).parent / "data/heat"
TINY = {"dims": (8, 8, 12, 16), "depths": (1, 1, 1, 1)}
LEAST = {"dims": (8, 12), "depths": (1, 1)}  # compiles soonest


def shapes_of(module, *args):
    return jax.eval_shape(lambda: module.init(jax.random.key(0), *args))["params"]


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# --- Sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "generation, depths, parameters, tensors",
    [
        pytest.param("c", (3, 8, 18, 3), 27_988_200, 309, marks=pytest.mark.weekly),
        pytest.param("c", (4, 4, 12, 4), 24_138_728, 237, marks=pytest.mark.weekly),
        ("c", (2, 2, 6, 2), 13_295_592, 129),
        pytest.param("a", (3, 8, 18, 3), 27_775_400, 277, marks=pytest.mark.weekly),
        ("a", (2, 2, 6, 2), 13_212_392, 117),
    ],
)
def test_released_sizes(generation, depths, parameters, tensors):
    """With the classifier of 1000 classes. Generation A's files hold a buffer for each block besides.

    The sizes of the registry's members are in test_port_strict.py.
    """
    leaves = jax.tree.leaves(shapes_of(HcNet(depths=depths, generation=generation), jnp.zeros((1, 32, 32, 3))))
    assert sum(leaf.size for leaf in leaves) + 513 * 1000 == parameters
    assert len(leaves) + 2 == tensors


def test_names_stand_for_the_released_depths():
    depths = {name: registry.encoder(name).depths for name in ("hcnet_t", "hcnet_t_551405", "hcnet_a_t")}
    assert depths == {"hcnet_t": (3, 8, 18, 3), "hcnet_t_551405": (5, 5, 14, 5), "hcnet_a_t": (5, 5, 14, 5)}
    assert [registry.encoder(name).generation for name in depths] == ["c", "c", "a"]


@pytest.mark.parametrize("stem_stride, last_stride, stride", [(4, 2, 32), (4, 1, 16), (2, 1, 8), (1, 2, 8), (1, 1, 4)])
def test_shapes_at_every_stride(stem_stride, last_stride, stride):
    encoder = HcNet(**TINY, stem_stride=stem_stride, last_stride=last_stride)
    assert (encoder.stride, encoder.width) == (stride, 16)
    (features, out), _ = jax.eval_shape(lambda: encoder.init_with_output(jax.random.key(0), jnp.zeros((2, 64, 96, 3))))
    assert features.shape == out["stage4"].shape == (2, 64 // stride, 96 // stride, 16)
    cells = [64 // stem_stride // n for n in (1, 1, 2, 4)]
    assert [out[name].shape[1] for name in ("stem", "stage1", "stage2", "stage3")] == cells


def test_refusals():
    images = jnp.zeros((1, 64, 64, 3))
    with pytest.raises(ValueError, match="multiples of 32"):
        shapes_of(HcNet(**TINY), jnp.zeros((1, 64, 80, 3)))
    with pytest.raises(ValueError, match="stem_stride is 3"):
        shapes_of(HcNet(**TINY, stem_stride=3), jnp.zeros((1, 96, 96, 3)))
    with pytest.raises(ValueError, match="generation is 'b'"):
        shapes_of(HcNet(**TINY, generation="b"), images)


def test_layers_count_from_the_head():
    encoder = HcNet(dims=(8, 8, 8, 8), depths=(1, 2, 1, 2))
    layers = {top: encoder.layer_of(f"{top}/conv/kernel") for top in shapes_of(encoder, jnp.zeros((1, 32, 32, 3)))}
    assert layers == {
        "stem": 7, "layers_0_0": 6, "down_0": 5, "layers_1_0": 5, "layers_1_1": 4, "down_1": 3, "layers_2_0": 3,
        "down_2": 2, "layers_3_0": 2, "layers_3_1": 1, "norm": 0,
    }  # fmt: skip


# --- Known activations -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generation", ["a", "c"])
def test_it_gives_every_known_activation(generation, monkeypatch, tmp_path):
    path = DATA / f"hcnet_{generation}.state_dict.safetensors"
    with safe_open(path, "np") as file:
        known = json.loads(file.metadata()["config"])
    fields = {"dims": tuple(known["embed_dim"]), "depths": tuple(known["depths"]), "generation": generation}
    name = f"hcnet_known_{generation}"
    monkeypatch.setitem(registry.ENCODERS, name, registry._hcnet(**fields))
    facts = port.port(path, name, tmp_path / "in", classes=10, image_size=64)
    buffers = {name for name in load_file(path) if name.endswith("mean_num")}
    assert set(facts["ignored"]) == buffers and len(buffers) == (sum(fields["depths"]) if generation == "a" else 0)
    model, activations = (
        qbheat_jax.load(tmp_path / "in"),
        load_file(DATA / f"hcnet_{generation}.activations.safetensors"),
    )
    params = model.variables["params"]

    @jax.jit
    def forward(images):
        (features, out), seen = model.encoder.apply(
            {"params": params["encoder"]}, images, capture_intermediates=True, mutable=["intermediates"]
        )
        logits = model.objective.head.apply({"params": params["head"]}, features, out)
        return (
            {name: tree["__call__"][0] for name, tree in seen["intermediates"].items() if name != "__call__"},
            out,
            logits,
        )

    for suffix in ("", ".64x96"):
        seen, out, logits = forward(activations[f"input{suffix}"].transpose(0, 2, 3, 1))
        ours = {name: seen[name] for name in ("stem", "norm")}
        ours |= {name: out[name] for name in ("stage1", "stage2", "stage3", "stage4")}
        ours |= {f"down{n + 1}": seen[f"down_{n}"] for n in range(3)}
        blocks = [(n, j) for n, depth in enumerate(fields["depths"]) for j in range(depth)]
        ours |= {f"layers.{n}.blocks.{j}": seen[f"layers_{n}_{j}"] for n, j in blocks}
        assert 2 * (len(ours) + 2) == len(activations), "none is left out"
        for name, x in ours.items():
            known = activations[name + suffix].transpose(0, 2, 3, 1)
            np.testing.assert_allclose(x, known, rtol=0, atol=1e-5, err_msg=name + suffix)
        np.testing.assert_allclose(logits, activations[f"logits{suffix}"], rtol=0, atol=1e-5)

    port.export(tmp_path / "in", tmp_path / "out.safetensors")
    before, after = load_file(path), load_file(tmp_path / "out.safetensors")
    assert before.keys() - buffers == after.keys()
    assert all(np.array_equal(before[name], x) and before[name].dtype == x.dtype for name, x in after.items())


def test_files_of_the_wrong_generation_are_refused(monkeypatch, tmp_path):
    monkeypatch.setitem(registry.ENCODERS, "hcnet_later", registry._hcnet(dims=(8, 16, 24, 32), depths=(1, 2, 1, 1)))
    with pytest.raises(UserError, match="hcnet_later") as error:
        port.port(DATA / "hcnet_a.state_dict.safetensors", "hcnet_later", tmp_path / "out", classes=10)
    assert error.value.exit_code == BAD_INPUT
    # B has A's gate, C's names of all else, and its own stencil.
    middle = {}
    for name, x in load_file(DATA / "hcnet_c.state_dict.safetensors").items():
        x = x[:, :, 1:4, 1:4] if "Anisotropic_conv" in name else x
        middle[f"module.{name.replace('DeltaT_DeltaD', 'fc_0')}"] = np.ascontiguousarray(x)
    save_file(middle, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="generation B") as error:
        port.port(tmp_path / "b.safetensors", "hcnet_later", tmp_path / "out", classes=10)
    assert error.value.exit_code == BAD_INPUT and not (tmp_path / "out").exists()


# --- Parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("height, width", [(4, 5), (1, 5), (2, 2), (1, 1)])
def test_the_isotropic_laplacian_is_the_mean_of_the_neighbours_that_exist(height, width):
    x = random(2, height, width, 3)
    expected = np.zeros_like(x)
    for i in range(height):
        for j in range(width):
            near = [
                x[:, r, c]
                for r in range(max(0, i - 1), min(height, i + 2))
                for c in range(max(0, j - 1), min(width, j + 2))
                if (r, c) != (i, j)
            ]
            if near:
                expected[:, i, j] = np.mean(near, 0) - x[:, i, j]
    np.testing.assert_allclose(isotropic_laplacian(x), expected, atol=1e-6)
    np.testing.assert_allclose(isotropic_laplacian(jnp.ones_like(x)), 0.0, atol=1e-6)


def test_the_anisotropic_laplacian_of_a_constant_lacks_the_taps_beyond_the_border():
    kernel, level = random(5, 5, 1, 3), np.float32(2.0)
    increment = np.asarray(anisotropic_laplacian(jnp.full((1, 6, 8, 3), level), kernel))[0]
    np.testing.assert_allclose(increment[2:-2, 2:-2], 0.0, atol=1e-5)
    outside = np.pad(np.zeros((6, 8)), 2, constant_values=1.0)
    for i, j in ((0, 0), (1, 4), (5, 7), (3, 6)):
        missing = (kernel[:, :, 0] * outside[i : i + 5, j : j + 5, None]).sum((0, 1))
        np.testing.assert_allclose(increment[i, j], -missing * level, atol=1e-5)


def test_the_centre_of_a_learnt_stencil_cancels():
    x, kernel = random(1, 6, 6, 2), random(5, 5, 1, 2, seed=1)
    other = kernel.copy()
    other[2, 2] += 3.0
    np.testing.assert_allclose(anisotropic_laplacian(x, kernel), anisotropic_laplacian(x, other), atol=1e-4)


def test_group_norm_is_over_the_whole_map_of_an_example():
    x = random(2, 3, 4, 6) * np.array([1.0, 3.0]).reshape(2, 1, 1, 1) + 0.5
    params = {"scale": random(6, seed=1), "bias": random(6, seed=2)}
    mean, var = x.mean((1, 2, 3), keepdims=True), x.var((1, 2, 3), keepdims=True)
    expected = (x - mean) / np.sqrt(var + 1e-5) * params["scale"] + params["bias"]
    np.testing.assert_allclose(GroupNorm().apply({"params": params}, x), expected, atol=1e-5)


def test_group_norm_keeps_float32_statistics_in_bfloat16():
    x = jnp.full((1, 64, 64, 8), 1.0, jnp.bfloat16).at[:, ::2].set(1.0078125)  # neighbours in bfloat16
    y = GroupNorm(dtype=jnp.bfloat16).apply({"params": {"scale": jnp.ones(8), "bias": jnp.zeros(8)}}, x)
    assert y.dtype == jnp.bfloat16
    half = 0.00390625  # the deviation; eps is two thirds of the variance
    np.testing.assert_allclose(np.abs(np.float32(y)), half / np.sqrt(half**2 + 1e-5), rtol=0.02)


@pytest.mark.parametrize("generation, rates", [("c", [0, 0.1, 0.2, 0.3]), ("a", [0, 0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3])])
def test_drop_path_grows_linearly_and_is_of_both_branches_in_the_first_generation(generation, rates):
    found = []

    def record(next_call, args, kwargs, context):
        if type(context.module).__name__ == "DropPath":
            found.append(context.module.rate)
        return next_call(*args, **kwargs)

    with nn.intercept_methods(record):
        shapes_of(HcNet(**TINY, generation=generation, drop_path=0.3), jnp.zeros((1, 32, 32, 3)))
    np.testing.assert_allclose(found, rates, atol=1e-6)


def test_initialisation():
    encoder = HcNet(dims=(32, 32, 32, 64), depths=(1, 1, 1, 1))
    params = jax.jit(encoder.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    blocks = {name: tree for name, tree in params.items() if name.startswith("layers")}
    drawn = [np.ravel(x) for x in jax.tree.leaves(blocks) if x.ndim == 4]
    assert len(drawn) == 4 * 5
    for x in drawn:
        assert abs(x.std() / 0.02 - 1) < 4 / np.sqrt(2 * x.size) and abs(x.mean()) < 4 * 0.02 / np.sqrt(x.size)
    vectors = {name: [tree[part]["bias"] for part in ("fc1", "fc2", "norm")] for name, tree in blocks.items()}
    assert not np.concatenate(sum(vectors.values(), [])).any()
    for tree, fan_in in (
        (params["stem"]["conv1"], 27),
        (params["stem"]["conv2"], 144),
        (params["down_2"]["conv"], 288),
    ):
        bound = fan_in**-0.5
        for x in jax.tree.leaves(tree):
            assert 0.6 * bound < np.abs(x).max() <= bound
        assert abs(np.std(tree["kernel"]) * 3**0.5 / bound - 1) < 0.1
    assert set(params["stem"]["conv1"]) == {"kernel", "bias"} and set(params["down_2"]["conv"]) == {"kernel"}
    head = registry.head("hcnet_t", 1000)
    weights = head.init(jax.random.key(0), jnp.zeros((1, 1, 1, 64)), {})["params"]["classifier"]
    assert abs(np.std(weights["kernel"]) / 0.02 - 1) < 0.02 and not weights["bias"].any()


# --- Training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generation", ["a", "c"])
def test_in_bfloat16_on_a_map_of_one_cell_gradients_are_finite(generation):
    encoder = HcNet(**LEAST, generation=generation, drop_path=0.2, dtype=jnp.bfloat16)
    shapes = shapes_of(encoder, jnp.zeros((1, 8, 8, 3)))
    assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}

    @jax.jit
    def step(params, images):
        def loss(params):
            features, _ = encoder.apply({"params": params}, images, True, rngs={"drop_path": jax.random.key(1)})
            assert features.dtype == jnp.bfloat16 and features.shape == (2, 1, 1, 12)
            return jnp.square(features.astype(jnp.float32) - 1.0).sum()

        return jax.value_and_grad(loss)(params)

    params = jax.tree.map(lambda x: 0.3 * random(*x.shape, seed=x.size), shapes)
    loss, gradient = step(params, random(2, 8, 8, 3))
    assert np.isfinite(loss) and all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))
    assert np.abs(gradient["stem"]["conv1"]["kernel"]).max() > 0


def test_112_pixels_at_stride_16_and_bfloat16_near_float32():
    encoders = [HcNet(**TINY, last_stride=1, dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16)]
    params = jax.tree.map(
        lambda x: (0.3 if x.ndim > 1 else 1.0) * random(*x.shape, seed=x.size),
        shapes_of(encoders[0], jnp.zeros((1, 32, 32, 3))),
    )
    images = random(1, 112, 48, 3)
    exact, near = (jax.jit(encoder.apply)({"params": params}, images)[0] for encoder in encoders)
    assert exact.shape == (1, 7, 3, 16) and np.isfinite(exact).all()
    assert np.abs(np.float32(near) - exact).max() < 0.03 * np.abs(exact).max()


@pytest.mark.parametrize(
    "objective",
    ["qbheat", *(pytest.param(name, marks=pytest.mark.weekly) for name in ("moco", "simmim", "supervised"))],
)
def test_every_method_trains_it(objective, small_config, monkeypatch, one_device):
    monkeypatch.setitem(registry.ENCODERS, "hcnet_micro", registry._hcnet({8: {}}, **LEAST))
    fields = {"encoder.name": "hcnet_micro", "encoder.drop_path": 0.1, "objective": objective, "batch_size": 4}
    more = {"moco": {"moco.queue": 8}, "supervised": {"head.classes": 3}, "simmim": {"simmim.mask_size": 8}}
    config = small_config({**fields, "decoder.depth": 0, **more.get(objective, {})})
    step = training.Step(config, methods.build(config))
    before = step.variables()["params"]["encoder"]
    losses = [float(step.call()) for _ in range(3)]
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before, step.variables()["params"]["encoder"])
    assert np.isfinite(losses).all() and min(jax.tree.leaves(moved)) > 0
