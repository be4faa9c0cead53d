"""Properties that hold for any input: quarters, the order of examples, boxes, resampling, durations."""

import functools
from fractions import Fraction

import hypothesis.strategies as st
import jax
import numpy as np
from hypothesis import example, given, settings
from hypothesis.extra import numpy as arrays

from qbheat_jax import config as config_lib
from qbheat_jax.data import order
from qbheat_jax.ops import boxes, quarters, resample
from qbheat_jax.train import config_tables, optim

# The same examples in every run, so that a failure can be repeated. Compiled functions take longer per example.
many = settings(derandomize=True, database=None, deadline=None, max_examples=60)
few = settings(many, max_examples=25)

seeds = st.integers(0, 2**32 - 1)
placements = st.integers(0, 2)


@st.composite
def axes(draw):
    """(cells, placement) of an axis that can be split so."""
    placement = draw(placements)
    return draw(st.integers(1, 20)) * (4 if placement == 1 else 2), placement


# --- Quarters ---------------------------------------------------------------------------------------------------------


@many
@given(axes())
def test_each_visible_cell_is_its_own_source_and_that_of_one_masked_cell(axis):
    cells, placement = axis
    source, step = quarters.sources(cells, placement)
    first = quarters.start(cells, placement)
    visible = np.arange(first, first + cells // 2)
    np.testing.assert_array_equal(np.flatnonzero(step == 0), visible)
    np.testing.assert_array_equal(source[visible], np.arange(cells // 2))
    assert sorted(source[step != 0]) == list(range(cells // 2))
    # A step is a distance in half images: the cell lies where its source and the step say.
    np.testing.assert_array_equal(first + source + step * cells / 2, np.arange(cells))


@many
@given(axes())
def test_a_mirrored_axis_has_mirrored_sources(axis):
    cells, placement = axis
    source, step = quarters.sources(cells, placement)
    mirrored_source, mirrored_step = quarters.sources(cells, 2 - placement)
    np.testing.assert_array_equal(mirrored_source[::-1], cells // 2 - 1 - source)
    np.testing.assert_array_equal(mirrored_step[::-1], -step)


@many
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 8))
def test_a_quarter_is_visible_and_masks_agree_with_slices(rows, columns, quarter):
    height, width = 4 * rows, 4 * columns
    shown = ~quarters.masked(height, width)[quarter]
    assert 4 * shown.sum() == height * width
    assert shown[quarters.visible_slices(height, width, quarter)].all()


# --- The order of examples --------------------------------------------------------------------------------------------


@many
@given(st.integers(1, 3000), seeds, st.integers(0, 1000))
def test_an_epoch_is_a_permutation(n, seed, epoch):
    assert sorted(order.permute(np.arange(n), n, seed, epoch)) == list(range(n))


@many
@given(st.integers(1, 2**40), seeds, st.data())
def test_an_example_does_not_depend_on_what_is_asked_beside_it(n, seed, data):
    places = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=8))
    together = order.permute(np.array(places), n, seed, 0)
    alone = [int(order.permute(place, n, seed, 0)[0]) for place in places]
    assert together.tolist() == alone and max(alone) < n
    assert len(set(alone)) == len(set(places))


@many
@given(st.integers(1, 50), seeds, st.integers(0, 3), st.booleans())
def test_positions_pass_over_every_example_once_an_epoch(n, seed, epoch, shuffle):
    epochs, index = order.Order(n, seed, shuffle=shuffle)(np.arange(epoch * n, (epoch + 1) * n))
    assert set(epochs) == {epoch} and sorted(index) == list(range(n))


@many
@given(st.integers(0, 1000), st.integers(1, 4), st.integers(1, 6), st.integers(1, 5), st.integers(1, 20))
def test_processes_share_each_batch_whatever_their_number(first, processes, rows, batches, most):
    size = processes * rows
    positions = []
    for process in range(processes):
        part = order.Slices(first, size, np.arange(process * rows, (process + 1) * rows), most)
        chunks = [part.positions(j) for j in range(batches * part.per_batch)]
        assert {len(chunk) for chunk in chunks} == {part.chunk} and part.chunk <= most
        positions += np.concatenate(chunks).tolist()
    assert sorted(positions) == list(range(first, first + batches * size))


# --- Boxes ------------------------------------------------------------------------------------------------------------

_COUNT = 8
# Sixteenths are exact in float32, and sums and halves of them too.
_corner = st.integers(0, 600).map(lambda k: k / 16)
_side = st.integers(1, 300).map(lambda k: k / 16)
_box = st.tuples(_corner, _corner, _side, _side).map(lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3]))
some_boxes = st.lists(_box, min_size=_COUNT, max_size=_COUNT).map(lambda b: np.array(b, np.float32))
iou, giou = jax.jit(boxes.iou), jax.jit(boxes.giou)
suppress = jax.jit(boxes.suppress)


@few
@given(some_boxes)
def test_centres_give_the_corners_back(drawn):
    np.testing.assert_array_equal(boxes.corners(boxes.centred(drawn)), drawn)


@few
@given(some_boxes, some_boxes)
def test_overlaps_are_symmetric_and_bounded(a, b):
    overlap, general = np.asarray(iou(a, b)), np.asarray(giou(a, b))
    np.testing.assert_allclose(overlap, iou(b, a), rtol=1e-6)
    np.testing.assert_allclose(general, giou(b, a), rtol=1e-5, atol=1e-6)
    assert (overlap >= 0).all() and (overlap <= 1).all()
    assert (general <= overlap + 1e-6).all() and (general > -1).all()
    np.testing.assert_array_equal(iou(a, a), np.ones(_COUNT))


@few
@given(some_boxes, some_boxes, st.integers(-64, 64), st.sampled_from((0.5, 2.0, 4.0)))
def test_overlaps_do_not_depend_on_place_or_scale(a, b, shift, scale):
    for overlap in (iou, giou):
        expected = np.asarray(overlap(a, b))
        np.testing.assert_allclose(overlap(a + np.float32(shift), b + np.float32(shift)), expected, atol=1e-5)
        np.testing.assert_allclose(overlap(a * np.float32(scale), b * np.float32(scale)), expected, atol=1e-5)


@few
@given(some_boxes, st.sampled_from((0.0, 0.3, 0.5, 0.9)))
def test_a_box_is_suppressed_exactly_where_an_earlier_kept_one_overlaps_it(drawn, threshold):
    kept = np.asarray(suppress(drawn, np.arange(_COUNT, 0, -1), threshold))
    overlaps = np.asarray(iou(drawn[:, None], drawn[None])) > threshold
    for n in range(_COUNT):
        assert kept[n] == (not overlaps[n, :n][kept[:n]].any())


# --- Resampling -------------------------------------------------------------------------------------------------------

_HEIGHT, _WIDTH, _SIZE = 24, 40, 16
crop_resize = jax.jit(functools.partial(resample.crop_resize, size=_SIZE))


@st.composite
def crops(draw):
    """(top, left, height, width) of whole pixels inside the image."""
    top, left = draw(st.integers(0, _HEIGHT - 1)), draw(st.integers(0, _WIDTH - 1))
    return top, left, draw(st.integers(1, _HEIGHT - top)), draw(st.integers(1, _WIDTH - left))


noise = seeds.map(lambda seed: np.random.default_rng(seed).integers(0, 256, (1, _HEIGHT, _WIDTH, 3), np.uint8))


@few
@given(crops(), arrays.arrays(np.uint8, 3))
def test_one_colour_stays_that_colour(crop, colour):
    image = np.broadcast_to(colour, (1, _HEIGHT, _WIDTH, 3))
    np.testing.assert_array_equal(crop_resize(image, np.float32([crop])), np.broadcast_to(colour, (1, _SIZE, _SIZE, 3)))


@few
@given(crops(), noise)
def test_a_mirrored_image_gives_the_mirrored_crop(crop, image):
    top, left, height, width = crop
    expected = np.asarray(crop_resize(image, np.float32([crop])), int)
    mirrored = crop_resize(image[:, :, ::-1], np.float32([(top, _WIDTH - left - width, height, width)]))
    assert np.abs(np.asarray(mirrored, int)[:, :, ::-1] - expected).max() <= 1


@few
@given(crops(), noise)
def test_only_pixels_of_the_crop_matter(crop, image):
    top, left, height, width = crop
    inside = (slice(None), slice(top, top + height), slice(left, left + width))
    other = 255 - image
    other[inside] = image[inside]
    np.testing.assert_array_equal(crop_resize(image, np.float32([crop])), crop_resize(other, np.float32([crop])))


# --- Durations --------------------------------------------------------------------------------------------------------

UNITS = ("", *(f"_{unit}" for unit in config_lib.UNITS))
amounts = st.floats(0, 1e4, allow_subnormal=False)
counts = st.integers(1, 10**6)


@many
@given(st.sampled_from(UNITS), amounts, amounts, counts, counts, counts)
def test_a_duration_is_whole_grows_with_its_value_and_is_0_for_0_alone(unit, one, other, batch, total, examples):
    def steps(value):
        return optim.duration({f"warmup{unit}": value, "batch_size": batch}, "warmup", total, examples)

    low, high = sorted((one, other))
    assert isinstance(steps(low), int) and steps(low) <= steps(high)
    assert (steps(low) == 0) == (low == 0)


@many
@given(st.integers(0, 1000), counts, counts, counts)
def test_one_duration_in_every_unit(epochs, batch, steps_an_epoch, total):
    examples = batch * steps_an_epoch
    expected = epochs * steps_an_epoch
    for field, value in (("warmup", expected), ("warmup_epochs", epochs), ("warmup_examples", epochs * examples)):
        found = optim.duration({field: value, "batch_size": batch}, "warmup", total, examples)
        assert abs(found - expected) <= 1e-9 * expected
    assert optim.duration({"warmup_percent": 100, "batch_size": batch}, "warmup", total, examples) == total


@many
@given(st.integers(1, 10**5), st.integers(1, 4096), st.integers(1, 2 * 10**6))
@example(29, 1, 100)  # 0.29 * 100 is a little less than 29 in floats
def test_a_run_of_epochs_has_the_whole_steps_of_their_exact_product(hundredths, batch, examples):
    config = config_tables.resolve({"total_epochs": hundredths / 100, "batch_size": batch})
    exact = Fraction(hundredths, 100) * examples / batch
    assert optim.total_steps(config, examples) == max(1, int(exact))


@many
@given(st.sampled_from(UNITS), st.sampled_from(UNITS), st.integers(1, 90), st.integers(1, 90))
def test_a_duration_of_the_command_line_takes_the_place_of_the_files(old, new, before, after):
    merged = config_lib.merge(
        {f"warmup{old}": before, "total_steps": 10}, {f"warmup{new}": after}, config_tables.PRETRAIN
    )
    assert merged == {f"warmup{new}": after, "total_steps": 10}
    config = config_tables.resolve(merged)
    assert config[f"warmup{new}"] == after and config_tables.from_json(config_lib.to_json(config)) == config
