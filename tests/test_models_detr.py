"""Detection by queries: matching against scipy, the loss against plain numpy, and runs that learn on any mesh."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from scipy.optimize import linear_sum_assignment

from qbheat_jax import data, device_mesh, methods
from qbheat_jax.errors import UserError
from qbheat_jax.methods import detr
from qbheat_jax.models import detr_detector as model
from qbheat_jax.tasks import detect
from tests.test_ops_boxes import plain_iou_giou
from tests.test_tasks_detect import SIZE, Squares, built, config, first_batch, losses_of

FIELDS = dict(objective="detr", detr__queries=8, detector__count=10)


@pytest.fixture(autouse=True, scope="module")
def small():
    """Narrow, and of two layers, so that it compiles soon; and the squares for images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model.SIZES, "small", (32, 2, 1, 2))
        patch.setattr(data, "open_source", lambda *a, **k: Squares())
        yield


@pytest.mark.parametrize("queries, boxes", [(7, 7), (12, 5), (30, 20)])
def test_matching_costs_what_scipys_does(queries, boxes):
    generator, match = np.random.default_rng(0), jax.jit(detr.matched)
    for turn in range(12):
        whole = turn % 2  # whole numbers from a small range: ties everywhere
        cost = generator.integers(0, 4, (queries, boxes)) if whole else generator.normal(0, 5, (queries, boxes))
        real = generator.random(boxes) < (turn % 4) / 3  # none of them, some, all
        found = np.asarray(match(cost.astype(np.float32), real))
        assert (found[~real] == -1).all() and len(set(found[real])) == real.sum() and (found[real] >= 0).all()
        rows, columns = linear_sum_assignment(cost[:, real])
        assert cost[found[real], np.flatnonzero(real)].sum() == pytest.approx(
            cost[:, real][rows, columns].sum(), abs=1e-4
        )
        if not whole:
            np.testing.assert_array_equal(found[real][columns], rows)


def test_a_cost_that_is_not_finite_is_the_last_to_be_taken():
    cost = np.array([[np.nan, 1.0], [2.0, np.inf], [5.0, 9.0]], np.float32)
    assert detr.matched(jnp.asarray(cost), jnp.ones(2, bool)).tolist() == [1, 0]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def focal(p, target):
    right = p if target else 1 - p
    return -(0.25 if target else 0.75) * (1 - right) ** 2 * np.log(right)


def centred(b):
    return np.array([(b[0] + b[2]) / 2, (b[1] + b[3]) / 2, b[2] - b[0], b[3] - b[1]])


def plain_loss(logits, found, boxes, classes, mask):
    """One layer's {"class", "box", "giou"}, image by image and box by box, with scipy's matching."""
    sums, number = dict.fromkeys(("class", "box", "giou"), 0.0), max(1, (classes >= 0).sum())
    for b in range(len(logits)):
        p, real = sigmoid(logits[b].astype(np.float64)), np.flatnonzero(classes[b] >= 0)
        cost = np.zeros((len(p), len(real)))
        for q in range(len(p)):
            for n, k in enumerate(real):
                c, giou = classes[b, k], plain_iou_giou(found[b, q].tolist(), boxes[b, k].tolist())[1]
                cost[q, n] = detr.CLASS * (focal(p[q, c], 1) - focal(p[q, c], 0)) - detr.GIOU * giou
                cost[q, n] += detr.L1 * np.abs(centred(found[b, q]) - centred(boxes[b, k])).sum()
        targets = np.zeros(p.shape)
        for q, n in zip(*linear_sum_assignment(cost)):
            targets[q, classes[b, real[n]]] = 1
            sums["box"] += np.abs(centred(found[b, q]) - centred(boxes[b, real[n]])).sum() / number
            sums["giou"] += (1 - plain_iou_giou(found[b, q].tolist(), boxes[b, real[n]].tolist())[1]) / number
        if mask[b]:
            sums["class"] += np.vectorize(focal)(p, targets).sum() / number
    return sums


def test_the_loss_is_that_of_plain_numpy_and_scipy():
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 2, (2, 4, 9, 3)).astype(np.float32)
    low = generator.uniform(0, 20, (2, 4, 9, 2))
    found = np.concatenate([low, low + generator.uniform(1, 12, (2, 4, 9, 2))], -1).astype(np.float32)
    low = generator.uniform(0, 20, (4, 5, 2))
    boxes = np.concatenate([low, low + generator.uniform(1, 12, (4, 5, 2))], -1).astype(np.float32)
    boxes[0, 1] = boxes[0, 0]  # the same box twice
    count = np.array([5, 2, 0, 0])  # the last two are empty, and the last one does not count
    classes = np.where(np.arange(5) < count[:, None], generator.integers(0, 3, (4, 5)), -1).astype(np.int32)
    mask = np.array([True, True, True, False])
    objective = detr.Detr(None, model.DETR(2))
    loss, metrics = jax.jit(lambda *a: objective.outputs_loss(*a, (32, 32)))((logits, found), boxes, classes, mask)
    layers = [plain_loss(logits[n], found[n] / 32, boxes / 32, classes, mask) for n in range(2)]
    for name, value in layers[-1].items():
        assert float(metrics[name]) == pytest.approx(value, rel=1e-4), name
    total = sum(2 * p["class"] + 5 * p["box"] + 2 * p["giou"] for p in layers)
    assert float(loss) == pytest.approx(total, rel=1e-4)
    nothing = np.full_like(classes, -1)
    gradient = jax.grad(lambda x: objective.outputs_loss((logits, x), boxes, nothing, mask, (32, 32))[0])
    assert (np.asarray(jax.jit(gradient)(found)) == 0).all(), "without boxes nothing is asked of where queries are"


def test_detections_are_the_best_pairs_of_the_last_layer():
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(2, 1, 4, 3)).astype(np.float32)
    found = np.tile([-5.0, 1, 9, 40], (2, 1, 4, 1)).astype(np.float32) + np.arange(4)[:, None]
    boxes, scores, classes = detr.Detr(None, model.DETR(2), count=20).decode((logits, found), (32, 32))
    order = np.argsort(-logits[-1, 0].reshape(-1))
    np.testing.assert_allclose(scores[0, :12], sigmoid(logits[-1, 0].reshape(-1)[order]), rtol=1e-5)
    assert (np.asarray(scores)[0, 12:] == 0).all() and classes[0, :12].tolist() == (order % 3).tolist()
    np.testing.assert_allclose(boxes[0, 0], [0, 1 + order[0] // 3, 9 + order[0] // 3, 32])


@pytest.mark.parametrize("anchors", [True, False])
def test_queries_begin_all_over_the_image_where_they_are_anchors(anchors):
    objective = built(**FIELDS, detr__anchors=anchors, detr__groups=1)
    variables = jax.jit(objective.init)(jax.random.key(0), first_batch())
    assert ("anchors" in variables["params"]["detector"]) == anchors
    outputs = jax.jit(objective._outputs)
    logits, found = outputs(variables["params"], variables["batch_stats"], jnp.zeros((2, SIZE, SIZE, 3)))
    assert logits.shape == (2, 2, 8, 2) and found.shape == (2, 2, 8, 4)
    middles = np.asarray(found[0, 0, :, :2] + found[0, 0, :, 2:]) / 2
    assert (np.ptp(middles, 0).min() > SIZE / 2) == anchors
    assert (np.asarray(found) >= -SIZE).all() and (np.asarray(found[..., 2:]) > np.asarray(found[..., :2])).all()


def test_queries_look_round_their_boxes():
    generator = np.random.default_rng(3)
    box, where = generator.normal(size=(2, 3, 4)), 0.3 * generator.normal(size=(2, 3, 2, 4))
    points = generator.random((5, 2))
    bias = np.asarray(model.near(jnp.asarray(box), jnp.asarray(points), jnp.asarray(where)))
    assert bias.shape == (2, 2, 3, 5)
    for b, h, q, m in np.ndindex(bias.shape):
        x, y, width, height = 1 / (1 + np.exp(-box[b, q]))
        right, down, wide, high = where[b, q, h]
        across = (points[m, 0] - x - right * width) / (width * np.exp(wide))
        along = (points[m, 1] - y - down * height) / (height * np.exp(high))
        np.testing.assert_allclose(bias[b, h, q, m], -(across**2 + along**2) / 2, rtol=2e-5)


def test_heads_begin_with_the_places_round_a_box():
    right, down, wide, high = np.asarray(model._around(None, (16,))).reshape(4, 4).T
    np.testing.assert_allclose(np.stack([right, down], 1), [[0.5, 0], [0, 0.5], [-0.5, 0], [0, -0.5]], atol=1e-6)
    np.testing.assert_allclose([wide, high], np.log(0.5))


def test_groups_do_not_see_each_other_and_the_first_is_asked():
    objective = built(**FIELDS, detr__groups=3)
    variables = jax.jit(objective.init)(jax.random.key(0), first_batch())
    images = objective.pixels.normalise(first_batch()["image"])
    together = jax.jit(objective._outputs)(variables["params"], variables["batch_stats"], images)
    assert together[0].shape[2] == 24
    asked = jax.jit(objective.detections)(variables, images)
    first = objective.decode([x[:, :, :8] for x in together], images.shape[1:3])
    for mine, theirs in zip(asked, first):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4)


def test_the_loss_of_groups_is_the_mean_of_theirs():
    generator = np.random.default_rng(5)
    middle, sides = generator.uniform(10, 20, (2, 2, 8, 2)), generator.uniform(2, 8, (2, 2, 8, 2))
    outputs = generator.normal(size=(2, 2, 8, 3)), np.concatenate([middle - sides, middle + sides], -1)
    boxes = np.array([[[2, 3, 9, 12], [8, 8, 30, 28]], [[1, 1, 20, 20], [0, 0, 0, 0]]], np.float32)
    classes, mask = np.array([[0, 2], [1, -1]]), np.ones(2, bool)

    def loss(groups, begin, end):
        part = [jnp.asarray(x[:, :, begin:end], jnp.float32) for x in outputs]
        objective = detr.Detr(None, model.DETR(3, groups=groups))
        return jax.jit(lambda part: objective.outputs_loss(part, boxes, classes, mask, (32, 32)))(part)

    (both, figures), (one, first), (other, second) = loss(2, 0, 8), loss(1, 0, 4), loss(1, 4, 8)
    np.testing.assert_allclose(both, (one + other) / 2, rtol=1e-5)
    np.testing.assert_allclose(figures["giou"], (first["giou"] + second["giou"]) / 2, rtol=1e-5)


def test_it_learns(tmp_path, one_device):
    fields = dict(FIELDS, total_steps=150, eval_every=0, checkpoint_every=150, log_every=25, learning_rate=0.1)
    result = detect.run(config(**fields), tmp_path)
    losses = list(losses_of(tmp_path).values())
    assert losses[-1] < 0.3 * losses[0] and result["protocol"] == "detr" and result["AP50"] > 0.4
    assert json.loads((tmp_path / "result.json").read_text()) == result


def test_a_batch_split_over_devices_has_the_loss_and_gradient_of_the_whole():
    generator = np.random.default_rng(0)
    low = generator.uniform(0, 20, (2, 8, 6, 2))
    found = np.concatenate([low, low + generator.uniform(1, 12, (2, 8, 6, 2))], -1).astype(np.float32)
    logits, batch = generator.normal(0, 2, (2, 8, 6, 2)).astype(np.float32), first_batch(8)
    objective = detr.Detr(None, model.DETR(2))

    def loss(outputs, boxes, classes, mask):
        return objective.outputs_loss(outputs, boxes, classes, mask, (SIZE, SIZE))[0]

    compute = jax.jit(jax.value_and_grad(loss))
    given = (logits, found), batch["boxes"], batch["classes"], batch["mask"]
    expected = compute(*given)
    mesh = device_mesh.make_mesh({"data": 8})
    rows, layers = (
        jax.NamedSharding(mesh, spec) for spec in (device_mesh.BATCH, PartitionSpec(None, *device_mesh.BATCH))
    )
    got = compute(jax.device_put(given[0], layers), *jax.device_put(given[1:], rows))
    assert len(got[1][0].sharding.device_set) == 8
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, expected)


def test_each_box_needs_a_query():
    with pytest.raises(UserError, match="detr.queries=2 is not accepted: it takes data.max_boxes=3 or more"):
        methods.build(config(**{**FIELDS, "detr__queries": 2}))
