"""Boxes: overlaps against plain numpy, suppression against a plain loop, and boxes that go along with their image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qbheat_jax.data import annotations as lists
from qbheat_jax.data.specs.boxes import BoxesSpec, paste
from qbheat_jax.ops import boxes as geometry


def drawn(generator, count, size=40, whole=False):
    """Corners float32 [count, 4]; `whole`: of whole numbers, so that many of them touch or are the same."""
    low = generator.uniform(0, size * 0.7, (count, 2))
    high = low + generator.uniform(0.5, size * 0.4, (count, 2))
    found = np.concatenate([low, high], -1)
    return (np.round(found) if whole else found).astype(np.float32)


def plain_iou_giou(a, b):
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [max(0.0, x[2] - x[0]) * max(0.0, x[3] - x[1]) for x in (a, b)]
    union = sum(areas) - width * height
    iou = width * height / union if union else 0.0
    around = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return iou, iou - ((around - union) / around if around else 0.0)


@pytest.mark.parametrize("whole", [False, True])
def test_overlaps_are_those_of_plain_numpy(whole):
    generator = np.random.default_rng(0)
    a, b = drawn(generator, 30, whole=whole), drawn(generator, 30, whole=whole)
    b[:3] = a[:3]  # the same
    b[3:5] = a[3:5] + 100  # far apart
    b[5, 2:] = b[5, :2]  # without area
    expected = np.array([[plain_iou_giou(x.tolist(), y.tolist()) for y in b] for x in a])
    np.testing.assert_allclose(geometry.iou(a[:, None], b[None]), expected[..., 0], atol=1e-5)
    np.testing.assert_allclose(geometry.giou(a[:, None], b[None]), expected[..., 1], atol=1e-5)
    gradient = jax.grad(lambda x: geometry.giou(x, b).sum())(jnp.asarray(a))
    assert np.isfinite(gradient).all()
    np.testing.assert_allclose(geometry.corners(geometry.centred(jnp.asarray(a))), a, atol=1e-5)


def plain_best(boxes, scores, count, candidates, threshold):
    pairs = sorted(((-s, n) for n, s in enumerate(scores.reshape(-1).tolist())))[:candidates]
    kept = []
    for score, n in pairs:
        place, kind = divmod(n, scores.shape[1])
        if all(k != kind or plain_iou_giou(boxes[place], boxes[p])[0] <= threshold for _, p, k in kept):
            kept.append((-score, place, kind))
    return kept[:count]


@pytest.mark.parametrize("count, candidates", [(15, 75), (20, 20), (60, 30)])
def test_suppression_is_that_of_a_plain_loop(count, candidates):
    generator, suppressed = np.random.default_rng(1), 0
    for _ in range(5):
        boxes, scores = drawn(generator, 25, 20), generator.uniform(0.01, 1, (25, 3)).astype(np.float32)
        expected = plain_best(boxes, scores, count, candidates, 0.1)
        suppressed += expected != plain_best(boxes, scores, count, candidates, 1.0)
        found, top, classes = geometry.top_detections(jnp.asarray(boxes), jnp.asarray(scores), count, candidates, 0.1)
        assert found.shape == (count, 4) and (np.asarray(top)[len(expected) :] == 0).all()
        for n, (score, place, kind) in enumerate(expected):
            np.testing.assert_allclose(top[n], score, rtol=1e-6)
            np.testing.assert_allclose(found[n], boxes[place], rtol=1e-6)
            assert classes[n] == kind
    assert suppressed


def own(corners, size=(40, 60), crowd=None):
    corners = np.asarray(corners, np.float32).reshape(-1, 4)
    crowd = np.zeros(len(corners), bool) if crowd is None else np.asarray(crowd)
    return lists.Boxes(corners, np.arange(len(corners), dtype=np.int32), crowd, size)


def test_mirrored_twice_is_the_same():
    boxes = own(drawn(np.random.default_rng(2), 20))
    once = boxes.flipped()
    np.testing.assert_allclose(once.corners[:, 0], 60 - boxes.corners[:, 2], atol=1e-5)
    assert (once.corners[:, 2:] > once.corners[:, :2]).all()
    np.testing.assert_allclose(once.flipped().corners, boxes.corners, atol=1e-5)


def test_cut_boxes_are_clipped_and_those_that_vanish_are_dropped():
    given = own([[0, 0, 10, 10], [50, 0, 58, 8], [-5, 0, 5, 20], [18, 18, 40, 40], [2, 2, 2.5, 2.5]])
    moved = given.moved((0, 0), (1, 1), (20, 20))
    # Whole; outside; cut to half; a hundredth of it left; as small as it was, and whole.
    np.testing.assert_array_equal(moved.classes, [0, 2, 4])
    np.testing.assert_array_equal(moved.corners, [[0, 0, 10, 10], [0, 0, 5, 20], [2, 2, 2.5, 2.5]])
    generator = np.random.default_rng(3)
    for _ in range(20):
        offset, scale = generator.uniform(-30, 30, 2), generator.uniform(0.3, 3, 2)
        moved = own(drawn(generator, 20)).moved(offset, scale, (25, 35))
        assert (moved.corners >= 0).all() and (moved.corners <= [35, 25, 35, 25]).all() and moved.size == (25, 35)
        assert (moved.corners[:, 2:] > moved.corners[:, :2]).all()
    assert len(lists.none((4, 4)).moved((0, 0), (2, 2), (8, 8))) == 0


def test_lists_have_one_length_without_crowds_and_keep_the_largest():
    boxes = own([[0, 0, 1, 1], [0, 0, 9, 9], [0, 0, 30, 30], [0, 0, 5, 5]], crowd=[False, False, True, False])
    corners, classes = boxes.padded(5)
    assert classes.tolist() == [0, 1, 3, -1, -1] and corners.dtype == np.float32 and (corners[3:] == 0).all()
    assert boxes.padded(2)[1].tolist() == [1, 3]
    assert lists.none((4, 4)).padded(2)[1].tolist() == [-1, -1]


def test_boxes_stay_on_what_they_are_around():
    """A white rectangle on black is where its box says after any scaling, cropping, padding and mirroring."""
    seen = 0
    for index in range(60):
        generator = np.random.default_rng(index)
        height, width = generator.integers(40, 90, 2).tolist()
        y, x = generator.integers(0, height - 20), generator.integers(0, width - 20)
        h, w = generator.integers(12, 20, 2).tolist()
        image = np.zeros((height, width, 3), np.uint8)
        image[y : y + h, x : x + w] = 255
        recipe = BoxesSpec(64, 7, (0,), True, flip=True, jitter=(0.6, 1.8), count=4)
        out = recipe.empty(1)
        recipe.prepare(out, 0, image, own([[x, y, x + w, y + h]], (height, width)), 3, index)()
        white = (out["image"][0] > 200).all(-1)
        if out["classes"][0, 0] < 0:
            assert white.sum() < 0.35 * h * w * out["scale"][0].prod()
            continue
        seen += 1
        rows, columns = np.flatnonzero(white.any(1)), np.flatnonzero(white.any(0))
        edges = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        np.testing.assert_allclose(out["boxes"][0, 0], edges, atol=1.6)
    assert seen > 40


def test_evaluation_shows_the_whole_image_in_the_top_left_corner():
    recipe = BoxesSpec(32, 0, (0,), False, flip=True, jitter=(0.5, 2.0), count=2)
    image = np.full((10, 20, 3), 255, np.uint8)
    out = recipe.empty(1)
    recipe.prepare(out, 0, image, own([[5, 5, 20, 10]], (10, 20)), 9, 1)()
    assert (out["image"][0, :16] == 255).all() and (out["image"][0, 16:] == [124, 116, 104]).all()
    np.testing.assert_allclose(out["boxes"][0, 0], [8, 8, 32, 16])
    np.testing.assert_allclose(out["scale"][0], [1.6, 1.6])
    np.testing.assert_array_equal(paste(image, (10, 20), (0, 0), 20)[:10], 255)
