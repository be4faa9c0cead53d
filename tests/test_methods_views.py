"""SimCLR, VICReg, LeJEPA and DINO: losses against plain numpy, schedules, and the crops that they see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qbheat_jax import methods
from qbheat_jax.errors import BAD_INPUT, UserError
from qbheat_jax.methods import dino, lejepa, simclr, vicreg
from qbheat_jax.methods.common import colours, ema, encoding, views
from qbheat_jax.models import registry
from qbheat_jax.ops import colour
from qbheat_jax.ops.images import Pixels
from tests.conftest import SMALL

MASK = np.array([True, True, False, True, True])


def projections(count=2, width=6):
    return np.random.default_rng(0).normal(size=(len(MASK), count, width)).astype(np.float32)


def test_nt_xent_against_numpy():
    z = projections()
    losses, nearest = jax.device_get(simclr.nt_xent(jnp.asarray(z), jnp.asarray(MASK), 0.3))
    z = z / np.linalg.norm(z, axis=-1, keepdims=True)
    for i, v in np.ndindex(5, 2):
        if not MASK[i]:
            continue
        others = [(j, w) for j in range(5) for w in range(2) if MASK[j] and (j, w) != (i, v)]
        logits = {one: z[i, v] @ z[one] / 0.3 for one in others}
        wanted = np.log(np.exp([*logits.values()]).sum()) - logits[i, 1 - v]
        np.testing.assert_allclose(losses[i, v], wanted, rtol=1e-5)
        assert nearest[i, v] == (max(logits, key=logits.get) == (i, 1 - v))


def test_vicreg_terms_against_numpy():
    z = projections()
    got = [float(x) for x in vicreg.terms(jnp.asarray(z), jnp.asarray(MASK))]
    z = z[MASK].astype(np.float64)
    hinge = np.mean([np.maximum(0, 1 - np.sqrt(z[:, v].var(0, ddof=1) + 1e-4)).mean() for v in (0, 1)])
    products = [np.cov(z[:, v].T) for v in (0, 1)]
    covariance = sum(((p - np.diag(np.diag(p))) ** 2).sum() / 6 for p in products)
    np.testing.assert_allclose(got, [((z[:, 0] - z[:, 1]) ** 2).mean(), hinge, covariance], rtol=1e-4)


def test_epps_pulley_against_its_closed_form():
    """n times the integral over all t, which 3 cuts at 1e-2 of it: sums of Gaussians of differences."""
    x = np.random.default_rng(1).normal(0.5, 2.0, (200, 3))
    counts = np.arange(200) % 4 > 0
    n, x64 = counts.sum(), x[counts]
    # With the weight exp(-t^2 / 2) each product of two characteristic functions integrates to a Gaussian.
    pairs = np.exp(-((x64[:, None] - x64) ** 2) / 2).sum((0, 1)) / n**2
    single = np.exp(-(x64**2) / 4).sum(0) / n
    wanted = n * np.sqrt(2 * np.pi) * (pairs - 2 * single / np.sqrt(2) + 1 / np.sqrt(3))
    got = lejepa.epps_pulley(jnp.asarray(x, jnp.float32), jnp.asarray(counts), 33)
    np.testing.assert_allclose(got, wanted, rtol=0.02)
    t, weights = lejepa.quadrature(17)
    real = (np.cos(t[:, None, None] * x64).mean(1) - np.exp(-(t[:, None] ** 2) / 2)) ** 2
    rule = n * (weights[:, None] * (real + np.sin(t[:, None, None] * x64).mean(1) ** 2)).sum(0)
    np.testing.assert_allclose(
        lejepa.epps_pulley(jnp.asarray(x, jnp.float32), jnp.asarray(counts), 17), rule, rtol=1e-4
    )


def test_sigreg_is_least_for_a_gaussian():
    x, everyone = np.random.default_rng(2).normal(size=(500, 1)), jnp.ones(500, bool)
    statistic = {
        name: float(lejepa.epps_pulley(jnp.asarray(values, jnp.float32), everyone, 17)[0])
        for name, values in {"normal": x, "alike": 0 * x, "wide": 3 * x, "two": np.sign(x)}.items()
    }
    assert all(statistic["normal"] * 10 < value for name, value in statistic.items() if name != "normal")


def test_dino_cross_entropy_against_numpy():
    student, teacher = projections(4, 7), np.exp(projections(2, 7))
    teacher /= teacher.sum(-1, keepdims=True)
    got = dino.cross_entropy(jnp.asarray(student), jnp.asarray(teacher))
    logs = student - np.log(np.exp(student).sum(-1, keepdims=True))
    pairs = [(t, s) for t in range(2) for s in range(4) if t != s]
    wanted = np.mean([-(teacher[:, t] * logs[:, s]).sum(-1) for t, s in pairs], 0)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


FIELDS = {
    "objective": "dino", "encoder.name": "vit_micro", "encoder.position": "learnt", "encoder.grid": 4,
    "dino.prototypes": 12, "dino.hidden": 16, "dino.bottleneck": 8, "dino.momentum": 0.9, "dino.warmup_temperature": 0.02,
    "dino.warmup_epochs": 1.0, "data.local_crops": 1, "data.local_size": 16, "views.blur": False, "views.jitter": 0.0,
    "batch_size": 5,
}  # fmt: skip


@pytest.fixture(scope="module")
def case():
    """(DINO of a ViT with a learnt position code, its variables, its jitted loss and gradient) in a run of 8 steps."""
    from qbheat_jax.train import config_tables

    config = config_tables.resolve({**SMALL, **FIELDS})
    method = methods.build(config, methods.Schedule(8, 2.0))
    shapes = methods.batch_spec(config).shapes(5)
    generator = np.random.default_rng(3)
    batch = {n: generator.integers(0, 256 if s.ndim > 1 else 2, s.shape).astype(s.dtype) for n, s in shapes.items()}
    batch["mask"] = MASK
    assert batch["image3"].shape == (5, 16, 16, 3)
    variables = jax.jit(method.init)(jax.random.key(0), batch)
    return method, variables, batch, jax.jit(jax.value_and_grad(method.loss, has_aux=True))


def test_dino_step_against_numpy(case):
    """The centre, the teacher, the temperature and the frozen prototypes of the first steps."""
    method, variables, batch, loss = case
    params, state = variables["params"], variables["batch_stats"]
    teacher = jax.tree.map(np.asarray, state["teacher_projector"]["params"])
    centre, key = np.zeros(12), jax.random.key(0)
    views_of = jax.jit(lambda: views.augmented(batch, method.colours, Pixels(), jax.random.split(key)[0])[0])()
    logits_of = jax.jit(method._teacher)
    for step in range(4):
        params = jax.tree.map(lambda p: p + 0.1 * np.cos(np.arange(p.size)).reshape(p.shape).astype(np.float32), params)
        (value, (state, metrics)), gradient = loss(params, state, batch, key)
        momentum = 1 - 0.1 * (np.cos(np.pi * step / 8) + 1) / 2
        teacher = jax.tree.map(lambda t, p: momentum * t + (1 - momentum) * np.asarray(p), teacher, params["projector"])
        for a, b in zip(*map(jax.tree.leaves, (teacher, state["teacher_projector"]["params"]))):
            np.testing.assert_allclose(a, b, atol=1e-5)
        given = np.asarray(logits_of(state, views_of))
        temperature = 0.02 + 0.02 * min(step / 2, 1)
        logits = (given - centre) / temperature
        probs = np.exp(logits - logits.max(-1, keepdims=True))
        probs /= probs.sum(-1, keepdims=True)
        entropy = -(probs * np.log(np.maximum(probs, 1e-30))).sum(-1).mean(1)[MASK].mean()
        np.testing.assert_allclose(metrics["teacher_entropy"], entropy, rtol=1e-3, atol=1e-4)
        centre = 0.9 * centre + 0.1 * given[MASK].mean((0, 1))
        np.testing.assert_allclose(state["centre"], centre, atol=1e-5)
        assert np.isfinite(value) and int(state["steps"]) == step + 1
        assert (np.abs(gradient["projector"]["last"]).max() > 0) == (step >= 2)
        assert np.abs(gradient["encoder"]["pos_embed"]).min(-1).all()  # the small crop's code is made of all of it


def test_what_does_not_count_changes_nothing(case):
    method, variables, batch, loss = case
    other = {n: np.where(MASK.reshape(-1, *[1] * (x.ndim - 1)), x, 0).astype(x.dtype) for n, x in batch.items()}
    (one, (a, _)), (two, (b, _)) = (
        loss(variables["params"], variables["batch_stats"], x, jax.random.key(1))[0] for x in (batch, other)
    )
    np.testing.assert_allclose(one, two, rtol=1e-6)
    np.testing.assert_allclose(a["centre"], b["centre"], atol=1e-6)


def test_local_crops_have_a_position_code_of_their_own_size():
    encoder = registry.encoder("vit_micro", position="learnt", grid=4)
    params = jax.jit(encoder.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    sized, own = encoding.at_size(encoder, params, 16)
    assert sized.grid == 2 and own["pos_embed"].shape == (1, 4, 16)
    assert encoding.at_size(encoder, params, 32)[1] is params


def test_running_statistics_of_a_teacher_forget_where_they_began():
    state = {
        "steps": jnp.asarray(0), "encoder": {"mean": jnp.ones(2)},
        "teacher_encoder": {"params": jnp.zeros(2), "batch_stats": {"mean": jnp.zeros(2)}},
    }  # fmt: skip
    after = ema.followed({"encoder": jnp.ones(2)}, state, ("encoder",), "teacher_", 0.99)["teacher_encoder"]
    np.testing.assert_allclose(after["params"], 0.01, rtol=1e-4)
    np.testing.assert_allclose(after["batch_stats"]["mean"], 0.9, rtol=1e-4)


def test_solarisation_inverts_what_is_bright():
    only = colours.Colours(colour.Jitter(), 0.0, 0.0, 0.0, solarise_prob=1.0)
    image = jnp.broadcast_to(jnp.asarray([0.2, 0.4, 0.9]), (1, 2, 2, 3))
    np.testing.assert_allclose(only(image, jax.random.key(0))[0, 0, 0], [0.2, 0.4, 0.1], atol=1e-6)


@pytest.mark.parametrize(
    "fields,said",
    [
        ({"objective": "simclr", "accumulate": 2}, "accumulate=2"),
        ({"objective": "dino", "accumulate": 2, "data.local_crops": 0}, "accumulate=2"),
        ({"objective": "dino", "data.local_size": 48}, "data.local_size=48"),
        ({"objective": "lejepa", "data.local_size": 20}, "data.local_size=20"),
        ({"objective": "ijepa", "encoder.name": "pebble"}, "encoder.name='pebble'"),
        ({"objective": "ijepa", "encoder.name": "vit_micro", "ijepa.target_scale": (1.0, 1.0)}, "ijepa.target_scale"),
    ],
)
def test_what_does_not_fit_is_refused(small_config, fields, said):
    with pytest.raises(UserError, match=said) as caught:
        methods.build(small_config(fields))
    assert caught.value.exit_code == BAD_INPUT
