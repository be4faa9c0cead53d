"""The page of `qbheat neighbours`: a row of pictures for each query, the nearest first."""

from qbheat_jax.report import environment, tiles
from qbheat_jax.report.template import save, template

# Pixels a side of the pictures.
_SIDE = 192


def write(about, shown, path):
    """Write the page and return its path.

    Args:
      about: {"init", "among", "n", "encoder", "step", "queries": as `tasks.neighbours.run` returns them}.
      shown: [(pixels of the query, [pixels of each neighbour]), ...] in the order of the queries: uint8 [H, W, 3], or None
        where there is no picture.
      path: `pathlib.Path` of the page.

    Raises:
      UserError: jinja2 is missing, or the page cannot be written.
    """
    rows = [
        {
            "query": entry["query"],
            "picture": _picture(query),
            "neighbours": [
                {**near, "picture": _picture(pixels)} for near, pixels in zip(entry["neighbours"], pictures)
            ],
        }
        for entry, (query, pictures) in zip(about["queries"], shown)
    ]
    page = template("neighbours.html.j2").render(about=about, rows=rows, versions=environment.versions())
    return save(path, page)


def _picture(pixels):
    """Return {"src", "width", "height"} of pixels uint8 [H, W, 3], None without them."""
    if pixels is None:
        return None
    height, width = pixels.shape[:2]
    return {"src": tiles.data_uri(pixels, _SIDE), "width": width, "height": height, "small": max(height, width) <= 96}
