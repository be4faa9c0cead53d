"""The nine placements: what is visible, and that every masked cell is predicted exactly once, from the right cell."""

import collections

import numpy as np
import pytest

from qbheat_jax.errors import UserError
from qbheat_jax.ops import quarters

GRIDS = [(4, 4), (16, 16), (8, 12), (20, 4)]
NINE = range(9)


def table(n, placement):
    """The axis table of the method, said the other way round: {visible cell: (predicted cell, signed step)}."""
    if placement == 0:
        return {i: (i + n // 2, 1.0) for i in range(n // 2)}
    if placement == 2:
        return {i: (i - n // 2, -1.0) for i in range(n // 2, n)}
    return {i: (i - n // 4, -0.5) if i < n // 2 else (i + n // 4, 0.5) for i in range(n // 4, 3 * n // 4)}


def predictions(height, width, quarter):
    """{visible cell: [cells made from it that are masked]}, read off `sources`."""
    (rows, row_steps), (columns, column_steps) = (
        quarters.sources(n, p) for n, p in zip((height, width), quarters.split(quarter))
    )
    top, left = (s.start for s in quarters.visible_slices(height, width, quarter))
    made = collections.defaultdict(list)
    for i in range(height):
        for j in range(width):
            if row_steps[i] or column_steps[j]:
                made[int(rows[i]) + top, int(columns[j]) + left].append((i, j))
    return made


@pytest.mark.parametrize("height,width", GRIDS)
@pytest.mark.parametrize("quarter", NINE)
def test_every_masked_cell_once_and_three_from_every_visible_cell(height, width, quarter):
    made = predictions(height, width, quarter)
    hidden = [(int(i), int(j)) for i, j in np.argwhere(quarters.masked(height, width)[quarter])]
    visible = {(int(i), int(j)) for i, j in np.argwhere(~quarters.masked(height, width)[quarter])}
    assert sorted(cell for cells in made.values() for cell in cells) == hidden
    assert set(made) == visible
    assert {len(cells) for cells in made.values()} == {3}


@pytest.mark.parametrize("cells", [4, 8, 12, 20])
@pytest.mark.parametrize("placement", [0, 1, 2])
def test_sources_and_signed_steps_are_those_of_the_method(cells, placement):
    expected = table(cells, placement)
    source, step = quarters.sources(cells, placement)
    first = min(expected)
    for i, (predicted, signed) in expected.items():
        assert (source[i], step[i]) == (i - first, 0.0)
        assert (source[predicted], step[predicted]) == (i - first, signed)


def test_the_published_example():
    """(3, 2) of the top-left block predicts (11, 2), (3, 10) and (11, 10), read as (x, y) or as (row, column)."""
    made = predictions(16, 16, quarters.NAMES.index("top-left"))
    assert set(made[3, 2]) == {(11, 2), (3, 10), (11, 10)}
    assert set(made[2, 3]) == {(2, 11), (10, 3), (10, 11)}


def test_middle_steps_go_outward_by_half_a_half():
    made = predictions(16, 16, quarters.NAMES.index("middle-center"))
    assert set(made[7, 8]) == {(3, 8), (7, 12), (3, 12)}


@pytest.mark.parametrize("height,width", GRIDS)
def test_a_quarter_is_visible_and_starts_slices_and_masks_agree(height, width):
    masks = quarters.masked(height, width)
    assert masks.shape == (9, height, width) and masks.dtype == bool
    for quarter in NINE:
        rows, columns = quarters.visible_slices(height, width, quarter)
        visible = np.zeros((height, width), bool)
        visible[rows, columns] = True
        assert visible.mean() == 0.25
        np.testing.assert_array_equal(masks[quarter], ~visible)
        assert (rows.stop - rows.start, columns.stop - columns.start) == (height // 2, width // 2)
        assert quarters.starts(height, 0)[quarter] == rows.start
        assert quarters.starts(width, 1)[quarter] == columns.start


def test_pixels_start_where_their_cells_do():
    for axis in (0, 1):
        np.testing.assert_array_equal(quarters.starts(12 * 16, axis), 16 * quarters.starts(12, axis))


def test_names_and_sets_say_where_the_block_is():
    expected = {"top": 0, "left": 0, "middle": 2, "center": 2, "bottom": 4, "right": 4}
    for quarter, name in enumerate(quarters.NAMES):
        starts = tuple(s.start for s in quarters.visible_slices(8, 8, quarter))
        assert starts == tuple(expected[word] for word in name.split("-"))
    corners = [quarters.NAMES[q] for q in quarters.PLACEMENT_SETS["corners"]]
    assert corners == ["top-left", "top-right", "bottom-left", "bottom-right"]
    assert [quarters.NAMES[q] for q in quarters.PLACEMENT_SETS["center"]] == ["middle-center"]
    assert set(quarters.PLACEMENT_SETS["corners_center"]) == {0, 2, 4, 6, 8}
    assert quarters.PLACEMENT_SETS["all9"] == tuple(NINE)


@pytest.mark.parametrize(
    "height,width,placements,reason",
    [
        (7, 8, [0], "height has 7 cells.* even"),
        (8, 5, [8], "width has 5 cells.* even"),
        (0, 8, [0], "height has 0 cells"),
        (6, 8, [4], "height has 6 cells.* multiple of 4"),
        (8, 6, [0, 1], "width has 6 cells.* quarter.placements='corners'"),
        (2, 2, range(9), "width has 2 cells.* multiple of 4"),
    ],
)
def test_grids_that_cannot_be_split_are_refused_with_the_reason(height, width, placements, reason):
    with pytest.raises(UserError, match=reason):
        quarters.check_grid(height, width, placements)


@pytest.mark.parametrize(
    "height,width,placements",
    [(6, 6, (0, 2, 6, 8)), (2, 2, (0, 2, 6, 8)), (6, 8, (1, 7)), (8, 6, (3, 5)), (8, 4, NINE)],
)
def test_grids_that_can_be_split_are_accepted(height, width, placements):
    quarters.check_grid(height, width, placements)
    for quarter in placements:
        assert set(map(len, predictions(height, width, quarter).values())) == {3}


def test_every_door_refuses():
    with pytest.raises(UserError, match="6 cells"):
        quarters.visible_slices(6, 6, 4)
    with pytest.raises(UserError, match="5 cells"):
        quarters.sources(5, 0)
    with pytest.raises(UserError, match="6 cells"):
        quarters.selection(6, (4,), 0)
    with pytest.raises(UserError, match="6 cells"):
        quarters.signed_steps(6, (4,), 0)


@pytest.mark.parametrize(
    "name,rows,columns",
    [
        ("corners", (-1.0, 1.0), (-1.0, 1.0)),
        ("center", (-0.5, 0.5), (-0.5, 0.5)),
        ("corners_center", (-1.0, -0.5, 0.5, 1.0), (-1.0, -0.5, 0.5, 1.0)),
    ],
)
def test_steps_of_a_set(name, rows, columns):
    placements = quarters.PLACEMENT_SETS[name]
    assert (quarters.steps(placements, 0), quarters.steps(placements, 1)) == (rows, columns)


def test_steps_of_an_axis_are_its_own():
    top_center = (quarters.NAMES.index("top-center"),)
    assert (quarters.steps(top_center, 0), quarters.steps(top_center, 1)) == ((1.0,), (-0.5, 0.5))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", list(quarters.PLACEMENT_SETS))
def test_selection_tables(name, axis):
    placements, cells = quarters.PLACEMENT_SETS[name], 12
    selection = quarters.selection(cells, placements, axis)
    assert selection.shape == (9, 2, cells, cells // 2)
    for quarter in NINE:
        if quarter not in placements:
            assert not selection[quarter].any()
            continue
        assert set(np.unique(selection[quarter])) == {0.0, 1.0}
        np.testing.assert_array_equal(selection[quarter].sum((0, 2)), 1)  # every cell from one cell, over one step
        np.testing.assert_array_equal(selection[quarter].sum((0, 1)), 2)  # every visible cell: itself and another
        source, step = quarters.sources(cells, quarters.split(quarter)[axis])
        for i in range(cells):
            assert selection[quarter, int(step[i] != 0), i, source[i]] == 1


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name, parts", [("corners", 1), ("center", 2), ("corners_center", 2), ("all9", 2)])
def test_reach_is_the_step_of_every_visible_cell(name, parts, axis):
    placements, cells = quarters.PLACEMENT_SETS[name], 12
    signed_steps = quarters.signed_steps(cells, placements, axis)
    assert signed_steps.shape == (9, parts)
    for quarter in placements:
        source, step = quarters.sources(cells, quarters.split(quarter)[axis])
        for i in np.flatnonzero(step):
            assert signed_steps[quarter, source[i] * parts // (cells // 2)] == step[i]
    assert not signed_steps[[q for q in NINE if q not in placements]].any()
