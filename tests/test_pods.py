"""One step on any mesh is the step on one device; so it is in parts, with recomputation, and with batch norm by groups."""

import functools
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from qbheat_jax import device_mesh, methods, pytree, rng
from qbheat_jax.errors import UserError
from qbheat_jax.models import kernels, layers, registry, resnet
from qbheat_jax.models.encoder import Encoder
from qbheat_jax.models.ghost_batch_norm import GhostBatchNorm
from qbheat_jax.train import config_tables, sharding, state
from tests.conftest import SMALL, Pebble


class ResNetMicro(Encoder):
    """A stem and two of ResNet's blocks, narrow."""

    width: int = 16
    stride: int = 8
    drop_path: float = 0.0
    dtype: Any = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(self, images, train=False):
        x = layers.ConvBN(8, 3, 4, dtype=self.dtype, name="stem")(images, train)
        block = layers.remat(resnet.ResNetBlock, self.remat)
        for n, stride in enumerate((2, 1)):
            x = block(4, stride, zero_init=False, drop_path=self.drop_path, dtype=self.dtype, name=f"layer1_{n}")(
                x, train
            )
        return x, {}


registry.ENCODERS.setdefault("resnet_micro", registry.Entry(ResNetMicro, {}, {8: {}}))
ENCODERS = ("vit_micro", "resnet_micro", "former_micro")
# Adam with its second moment damped: it would make whole steps of mere rounding.
OPTIMIZER = optax.adamw(0.1, eps=0.1)
QUICKLY = {"xla_backend_optimization_level": 0}  # what runs is as exact, and three steps need not be fast
MESHES = ((8, 1, 1), (4, 2, 1), (2, 2, 2), (1, 8, 1))


def mesh_of(data=1, fsdp=1, model=1):
    return device_mesh.make_mesh(dict(zip(device_mesh.AXES, (data, fsdp, model))), jax.devices()[: data * fsdp * model])


def config_of(encoder, **fields):
    own = {"encoder.name": encoder, "encoder.drop_path": 0.3, "decoder.depth": int(encoder == "vit_micro")}
    return config_tables.resolve({**SMALL, **own, **fields})


def batch_of(config):
    """Return random examples of a config, of which the first three do not count."""
    generator = np.random.default_rng(0)
    return {
        "image": generator.integers(0, 256, (config.batch_size, config.image_size, config.image_size, 3), np.uint8),
        "quarter": generator.choice([0, 2, 4, 6, 8], config.batch_size).astype(np.int32),
        "label": np.zeros(config.batch_size, np.int32),
        "mask": np.arange(config.batch_size) > 2,
    }


@functools.cache
def born(encoder):
    """The state that every run of an encoder begins with, on one device: to make it anew on each mesh takes a while."""
    config = config_of(encoder)
    shapes = methods.batch_spec(config).shapes(config.batch_size)
    return state.create(methods.build(config), OPTIMIZER, shapes, rng.root(3), mesh_of())[0]


def parts_of(config, mesh):
    """(objective, state, the compiled step, a batch on the mesh)."""
    objective, key = methods.build(config), rng.root(config.seed)
    shardings = sharding.shardings(born(config.encoder.name), mesh)
    # Through the host: a state that shared buffers with `born` would be donated with them.
    current = jax.device_put(jax.device_get(born(config.encoder.name)), shardings)
    step = state.train_step(objective, OPTIMIZER, key, shardings, mesh, 0.0, config.accumulate)
    batch = device_mesh.put_batch(batch_of(config), mesh)
    return objective, current, step.lower(current, batch).compile(QUICKLY), batch


def watched(config, mesh, steps=2):
    """-> (losses, the state after `steps` steps of the same batch), the text of the compiled step."""
    _, current, step, batch = parts_of(config, mesh)
    losses = []
    for _ in range(steps):
        current, metrics = step(current, batch)
        losses.append(float(metrics["loss"]))
    return (losses, current), step.as_text()


def trained(config, mesh):
    """-> (losses, the state after two steps)."""
    return watched(config, mesh)[0]


@functools.cache
def trained_alone(encoder):
    """(losses, the state after two steps) of one device."""
    return trained(config_of(encoder), mesh_of())


def assert_same(got, expected, atol=2e-6):
    np.testing.assert_allclose(got[0], expected[0], rtol=5e-6)
    trees_of = [(s.params, s.batch_stats) for _, s in (got, expected)]
    for (name, a), (_, b) in zip(*map(pytree.names, trees_of)):
        np.testing.assert_allclose(a, b, atol=atol, rtol=1e-5, err_msg=name)


@pytest.fixture(scope="module", autouse=True)
def accelerators_depthwise_convolution():
    """The form that GPUs and TPUs are given, which compiles far sooner than the CPU's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_depthwise", kernels._grouped)
        yield


def cases():
    """Every mesh of a transformer; of the others, which no mesh splits along model, one. Their other meshes are `weekly`."""
    often = {"vit_micro": MESHES, "resnet_micro": MESHES[1:2], "former_micro": MESHES[2:3]}
    for encoder in ENCODERS:
        for axes in MESHES:
            yield pytest.param(encoder, axes, marks=[pytest.mark.weekly] * (axes not in often[encoder]))


@pytest.mark.parametrize("encoder, axes", list(cases()))
def test_any_mesh_trains_as_one_device_does(encoder, axes, monkeypatch):
    expected = trained_alone(encoder)
    monkeypatch.setattr(sharding, "SMALLEST_SPLIT", 16)  # so that even these small nets are split
    got = trained(config_of(encoder), mesh_of(*axes))
    assert_same(got, expected)
    specs = {name: leaf.sharding.spec for name, leaf in pytree.names(got[1])}
    split = {axis: [n for n, spec in specs.items() if axis in spec] for axis in ("fsdp", "model")}
    for part in ("params/encoder", "params/decoder", "mu/encoder", "nu/decoder"):
        assert any(part in name for name in split["fsdp"]) == (axes[1] > 1)
    assert any("decoder/block0/attn" in name for name in split["model"]) == (axes[2] > 1 and encoder == "vit_micro")
    if encoder == "vit_micro" and axes == (2, 2, 2):
        block = "params/encoder/block0/"
        for first, second in (("attn/qkv", "attn/proj"), ("fc1", "fc2")):
            assert specs[f"{block}{first}/kernel"] == PartitionSpec("fsdp", "model")
            assert specs[f"{block}{first}/bias"] == PartitionSpec("model")
            assert specs[f"{block}{second}/kernel"] == PartitionSpec("model", "fsdp")
            assert "model" not in specs[f"{block}{second}/bias"]


def collectives(text):
    """[(kind, numbers that come out)] of every collective in the text of a compiled step."""
    pattern = r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
    found = []
    for shapes, kind in re.findall(pattern, text):
        sizes = [int(np.prod([int(n) for n in s.split(",") if n])) for s in re.findall(r"\w+\[([\d,]*)\]", shapes)]
        found.append((kind, sum(sizes)))
    return found


def compiled(config, mesh):
    """The collectives of the compiled step, and the state it is of."""
    _, current, step, _ = parts_of(config, mesh)
    return collectives(step.as_text()), current


def test_parameters_are_gathered_one_at_a_time(monkeypatch):
    monkeypatch.setattr(sharding, "SMALLEST_SPLIT", 16)
    found, current = compiled(config_of("vit_micro"), mesh_of(1, 8, 1))
    kernels = [leaf.size for name, leaf in pytree.names(current.params) if name.endswith("kernel")]
    gathered = [size for kind, size in found if kind == "all-gather"]
    assert max(gathered) == max(kernels) < pytree.count(current.params) / 3
    assert sum(size in kernels for size in gathered) >= len(kernels)
    # Gradients are summed over the devices: scattered, or (on a CPU) whole.
    assert sum(size for kind, size in found if kind in ("all-reduce", "reduce-scatter")) >= sum(kernels) / 8


def test_tensor_parallel_blocks_exchange_little():
    config = config_of("vit_micro", **{"batch_size": 32})
    found, _ = compiled(config, mesh_of(1, 1, 2))
    sizes, cells = [size for _, size in found], {"encoder": 4, "decoder": 16}
    # After proj and fc2, and in the gradient before fc1, batch x cells x width; before query, key and value three at once,
    # which a TPU's compiler adds up first and a CPU's does not. Before the encoder's only block those are put off until the
    # patch kernel's gradient, which is smaller.
    assert all(sizes.count(32 * n * 16) == 3 for n in cells.values())
    assert sizes.count(3 * 32 * cells["decoder"] * 16) == 1 and max(sizes) == 3 * 32 * cells["decoder"] * 16
    assert {kind for kind, _ in found} == {"all-reduce", "all-gather"}
    assert max(size for kind, size in found if kind == "all-gather") == 16 * 3 * 16  # weights of qkv


@pytest.mark.parametrize("axes", [(4, 2, 1), (2, 1, 2)])
def test_attention_in_parts_is_that_of_the_whole_batch_and_moves_no_more(axes, monkeypatch):
    config, alone = config_of("vit_micro"), trained_alone("vit_micro")
    expected, _ = compiled(config, mesh_of(*axes))
    monkeypatch.setattr(layers, "_parts", lambda *_: 2)  # as on TPUs
    got, text = watched(config, mesh_of(*axes))
    assert_same(got, alone)
    assert sorted(collectives(text)) == sorted(expected)


def test_accumulated_gradients_are_those_of_the_whole_batch():
    plain = {"encoder.drop_path": 0.0}
    expected = trained(config_of("vit_micro", **plain), mesh_of())
    got = trained(config_of("vit_micro", **plain, accumulate=4), mesh_of(2, 2))
    assert_same(got, expected)


def test_accumulation_updates_running_statistics_part_after_part():
    config = config_of("pebble", accumulate=2)
    objective, current, step, batch = parts_of(config, mesh_of())
    stats, params = current.batch_stats, jax.tree.map(jnp.copy, current.params)
    expected = stats
    loss = jax.jit(objective.loss)
    for part in range(2):
        rows = {name: x[part::2] for name, x in batch.items()}
        _, (expected, _) = loss(params, expected, rows, jax.random.key(0))
    final, _ = step(current, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), final.batch_stats, expected)


@pytest.mark.parametrize("encoder", ["vit_micro", "resnet_micro"])
def test_recomputation_changes_nothing(encoder):
    """With a norm of tokens and with one of a batch. That the other encoders recompute their blocks is seen below."""
    config = config_of(encoder, remat="nothing_saveable")
    assert_same(trained(config, mesh_of()), trained_alone(encoder))
    objective, current, batch = methods.build(config), born(encoder), batch_of(config)
    loss = jax.grad(lambda p: objective.loss(p, current.batch_stats, batch, jax.random.key(0))[0])
    assert str(jax.make_jaxpr(loss)(current.params)).count("policy=<function nothing_saveable") >= 2


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "mobile_former_26m", "vit_ti"])
def test_every_encoder_recomputes_its_blocks(name):
    images = jnp.zeros((2, 32, 32, 3))
    plain, remat = (registry.encoder(name, remat=policy) for policy in ("none", "dots_saveable"))
    shapes = [jax.eval_shape(e.init, jax.random.key(0), images) for e in (plain, remat)]
    assert pytree.differences(*shapes) == []

    def text(encoder):
        def total(variables):
            return encoder.apply(variables, images, True, mutable=["batch_stats"])[0][0].sum()

        return str(jax.make_jaxpr(total)(shapes[0]))

    assert "policy=" not in text(plain) and text(remat).count("policy=") > 5


def test_batch_norm_by_groups():
    pebble, images = Pebble(), jax.random.normal(jax.random.key(0), (8, 16, 16, 3))
    variables = pebble.init(jax.random.key(1), images)
    train = functools.cache(lambda m: jax.jit(lambda images: m.apply(variables, images, True, mutable=["batch_stats"])))
    (got, out), updated = train(GhostBatchNorm(pebble, 2))(images)
    halves = [train(pebble)(half) for half in (images[:4], images[4:])]
    np.testing.assert_allclose(got, jnp.concatenate([features for (features, _), _ in halves]), atol=1e-6)
    assert out["conv"].shape == got.shape
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *(stats for _, stats in halves))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), updated, mean)
    whole, _ = train(pebble)(images)
    assert float(jnp.abs(whole[0] - got).max()) > 1e-2, "groups of other images are normalised in another way"
    evaluated = GhostBatchNorm(pebble, 2).apply(variables, images)[0]
    np.testing.assert_array_equal(evaluated, pebble.apply(variables, images)[0])


def test_batch_norm_groups_need_no_communication_where_each_device_has_its_own():
    def reduced(groups):  # numbers summed over devices, by operation
        found, current = compiled(config_of("pebble", bn_groups=groups), mesh_of(8))
        return [size for kind, size in found if kind == "all-reduce"], current

    global_sums, current = reduced(1)
    own, _ = reduced(8)
    # On the way no statistics are waited for; what running averages need goes along with the gradients at the end.
    statistics = pytree.count(current.batch_stats)
    assert statistics == 32 and statistics in global_sums and statistics not in own
    assert len(own) < len(global_sums) and sum(own) <= sum(global_sums)


def test_what_cannot_be_split_is_refused():
    def says(words, **fields):
        with pytest.raises(UserError, match=words):
            config_of("pebble", **fields)

    says("batch_size=16 is not accepted: it takes a multiple of accumulate=3 times bn_groups=1", accumulate=3)
    says("batch_size=16 is not accepted: .* accumulate=2 times bn_groups=3", accumulate=2, bn_groups=3)
    says("accumulate=2 is not accepted: it takes 1 with objective='moco'", accumulate=2, objective="moco")
    says("accumulate=0 is not accepted: it takes a number that is at least 1", accumulate=0)
    says("remat='all' is not accepted: it takes one of 'none', 'nothing_saveable'", remat="all")
    says("mesh.model=-1 is not accepted: .* when mesh.data is -1", **{"mesh.model": -1})
    with pytest.raises(UserError, match=r"batch_size=16 .* multiple of the mesh's 8 devices times accumulate=4, 32"):
        sharding.check_batch(16, methods.build(config_of("pebble")), mesh_of(8), 4)
    with pytest.raises(UserError, match=r"batch_size=18 .* multiple of the mesh's 4 devices along data and fsdp"):
        sharding.check_batch(18, methods.build(config_of("vit_micro")), mesh_of(2, 2, 2))
    sharding.check_batch(20, methods.build(config_of("vit_micro")), mesh_of(2, 2, 2))
    with pytest.raises(UserError, match=r"batch_size=20 .* multiple of the mesh's 8 devices$"):
        sharding.check_batch(20, methods.build(config_of("pebble")), mesh_of(2, 2, 2))
    with pytest.raises(UserError, match=r"mesh.model=8 is not accepted: the encoder has 2 attention heads"):
        sharding.check_heads(methods.build(config_of("vit_micro")), mesh_of(1, 1, 8))
    objective, mesh = methods.build(config_of("pebble")), mesh_of(4, 1, 2)
    shapes = jax.eval_shape(objective.init, jax.random.key(0), methods.batch_spec(config_of("pebble")).shapes(16))
    with pytest.raises(UserError, match="mesh.model=2 is not accepted: this model has no transformer blocks"):
        sharding.check_split(sharding.shardings(shapes, mesh), mesh)
    sharding.check_split(sharding.shardings(shapes, mesh_of(8)), mesh_of(8))
