"""The report's charts as inline SVG. The page's style sheet gives the colours, light or dark."""

import contextlib
import io
import re

import numpy as np

from qbheat_jax.errors import UserError

# Colours that stand for a variable of the style sheet: matplotlib writes them, `_inline` replaces them.
_INK, _FAINT, _WARM, _COOL, _GREY = "#010203", "#010204", "#010205", "#010206", "#010207"
_VARIABLES = {_INK: "--ink-2", _FAINT: "--line", _WARM: "--warm", _COOL: "--cool", _GREY: "--grey"}
# Colours of runs, told apart also where colours are not seen well: each with every kind of dashes.
_RUNS = [f"#0102{n:02x}" for n in range(8, 16)]
_VARIABLES |= {colour: f"--run-{n}" for n, colour in enumerate(_RUNS)}
_DASHES = ((), (6, 2), (2, 1.6))
RUN_STYLES = [(colour, dashes) for dashes in _DASHES for colour in _RUNS]

DIRECTIONS = {"x+": "A+, to the right", "x-": "A\u2212, to the left", "y+": "B+, down", "y-": "B\u2212, up"}

# Small, so that on a phone the text is hardly scaled down.
_WIDTH = 5.0
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "qbheat",
    "font.size": 10.5,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.labelpad": 6,
    "grid.color": _FAINT,
    "grid.linewidth": 0.6,
    "text.color": _INK,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 10.5,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}


def losses(train, val, variance, rate):
    """Draw losses against the step, the learning rate beneath. Each is a pair (steps, values), empty where not logged."""
    tall = bool(rate[0])
    with _figure(4.0 if tall else 3.1) as figure:
        ratios = (3.4, 1) if tall else (1,)
        axes = figure.subplots(len(ratios), 1, sharex=True, squeeze=False, height_ratios=ratios)
        top = axes[0, 0]
        top.plot(*variance, color=_GREY, linestyle=(0, (4, 3)), linewidth=1.4, label="predicting the mean")
        top.plot(*train, color=_COOL, label="train")
        top.plot(*val, color=_WARM, marker="o", markersize=4, label="validation")
        drawn = [value for _, values in (train, val, variance) for value in values]
        if min(drawn) > 0 and max(drawn) > 3 * np.median(drawn):
            top.set_yscale("log")
        else:
            top.set_ylim(bottom=0)
        top.set_ylabel("loss")
        _legend(top)
        if tall:
            axes[1, 0].fill_between(*rate, color=_GREY, alpha=0.35, linewidth=0)
            axes[1, 0].plot(*rate, color=_GREY, linewidth=1.2)
            axes[1, 0].set_ylim(bottom=0)
            axes[1, 0].set_ylabel("rate")
            axes[1, 0].ticklabel_format(axis="y", style="plain")
            axes[1, 0].locator_params(axis="y", nbins=3)
        axes[-1, 0].locator_params(axis="x", integer=True)
        axes[-1, 0].set_xlabel("step")
        figure.align_ylabels()
        return _inline(figure, "loss")


def spread(std, ratio):
    """Draw how far features are spread against the step: `feature_std` over `participation_ratio`, pairs (steps, values)."""
    with _figure(3.6) as figure:
        axes = figure.subplots(2, 1, sharex=True)
        for part, values, colour, label in ((axes[0], std, _COOL, "deviation"), (axes[1], ratio, _WARM, "dimensions")):
            part.plot(*values, color=colour)
            part.set_ylim(bottom=0)
            part.set_ylabel(label)
            part.locator_params(axis="y", nbins=4)
        axes[1].locator_params(axis="x", integer=True)
        axes[1].set_xlabel("step")
        figure.align_ylabels()
        return _inline(figure, "spread")


def accuracies(ours, random, chance, name, method="QB-Heat"):
    """Draw held-out accuracy against the epoch. `ours`, `random`: a pair (epochs, fractions) for each seed."""
    with _axes(3.1) as axes:
        for curves, colour, label in ((ours, _WARM, method), (random, _COOL, "random initialisation")):
            for i, (epochs, values) in enumerate(curves):
                axes.plot(
                    epochs, 100 * np.asarray(values), color=colour, label=label if i == 0 else None,
                    alpha=1.0 if len(curves) == 1 else 0.75, marker="o" if len(epochs) < 3 else None,
                )  # fmt: skip
        if chance is not None:
            axes.axhline(100 * chance, color=_GREY, linestyle=(0, (4, 3)), linewidth=1.4, label="chance")
        axes.set_ylim(bottom=0)
        axes.locator_params(axis="x", integer=True)
        _legend(axes)
        return _inline(axes.figure, f"accuracy-{name}", "epoch", "held-out top-1, %")


def spectra(spectra, radius, name="spectra"):
    """Draw eigenvalues {"x+": complex [C], ...} and, with radius r > 0, the circle |1 + lambda / r| = 1."""
    with _axes(3.9) as axes:
        if radius:
            angle = np.linspace(0, 2 * np.pi, 181)
            circle = radius * (np.cos(angle) - 1), radius * np.sin(angle)
            axes.plot(*circle, color=_GREY, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.axhline(0, color=_GREY, linewidth=0.8)
        axes.axvline(0, color=_GREY, linewidth=0.8)
        for way, values in spectra.items():
            colour = _WARM if way[0] == "x" else _COOL
            axes.scatter(
                np.real(values), np.imag(values), s=16, alpha=0.85, linewidths=1.0, edgecolors=colour,
                facecolors=colour if way[1] == "+" else "none", label=DIRECTIONS[way],
            )  # fmt: skip
        axes.set_aspect("equal", adjustable="datalim")
        axes.figure.legend(loc="outside upper center", ncols=2, handletextpad=0.2)
        return _inline(axes.figure, name, "real part, per half image", "imaginary part")


def speeds(groups, name):
    """Draw wave speeds in the complex plane; both axes are linear from -1 to 1 and logarithmic beyond.

    groups: (label, key of LINES, whether the dots are filled, speeds complex [C]).
    """
    with _axes(3.9) as axes:
        axes.axhline(0, color=_GREY, linewidth=0.8)
        axes.axvline(0, color=_GREY, linewidth=0.8)
        for label, key, filled, values in groups:
            colour = LINES[key][0]
            axes.scatter(
                np.real(values), np.imag(values), s=16, alpha=0.85, linewidths=1.0, edgecolors=colour,
                facecolors=colour if filled else "none", label=label,
            )  # fmt: skip
        axes.set_xscale("symlog", linthresh=1.0)
        axes.set_yscale("symlog", linthresh=1.0)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:g}".replace("-", "\u2212"))
        axes.figure.legend(loc="outside upper center", ncols=2, handletextpad=0.2)
        return _inline(axes.figure, name, "real part of the speed", "imaginary part")


# Colour and dashes of the lines of `explained` and `growth`, and colour of the dots of `speeds`.
LINES = {
    "learnt": (_WARM, "-"),
    "fitted": (_COOL, "-"),
    "copy": (_COOL, (0, (4, 3))),
    "random": (_INK, (0, (1, 1.5))),
    "shuffled": (_GREY, "-"),
}


def explained(curves, lowest, name):
    """Draw R^2 against distance, down to `lowest`. curves: (label, key of LINES, distances, [(r2, low, high), ...])."""
    with _axes(3.6) as axes:
        axes.axhline(0, color=_GREY, linewidth=0.8)
        for label, key, distances, values in curves:
            colour, dashes = LINES[key]
            r2, low, high = np.asarray(values).T
            axes.fill_between(distances, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.plot(distances, r2, color=colour, linestyle=dashes, marker="o", markersize=4, label=label)
        axes.set_ylim(lowest, 1.02)
        axes.set_xticks(sorted({d for curve in curves for d in curve[2]}))
        axes.figure.legend(loc="outside upper left", ncols=2, columnspacing=1.2, handletextpad=0.5)
        return _inline(axes.figure, name, "distance, cells", "R\u00b2")


def intervals(rows, name):
    """Draw R^2 with its interval, one line for each of `rows`: (label, key of LINES, r2, low, high)."""
    with _axes(0.9 + 0.3 * len(rows)) as axes:
        axes.axvline(0, color=_GREY, linewidth=0.8)
        for y, (_, key, r2, low, high) in enumerate(rows):
            axes.plot([low, high], [y, y], color=LINES[key][0], linewidth=1.6)
            axes.plot([r2], [y], color=LINES[key][0], marker="o", markersize=6)
        axes.set_yticks(range(len(rows)), [row[0] for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.margins(x=0.08)
        axes.grid(axis="y", visible=False)
        return _inline(axes.figure, name, "R\u00b2 on test images")


def growth(curves, name):
    """Draw the sorted factors of the eigenvectors over half an image. curves: (label, key of LINES, values)."""
    with _axes(3.4) as axes:
        axes.axhline(1, color=_GREY, linewidth=0.8)
        for label, key, values in curves:
            colour, dashes = LINES[key]
            axes.plot(range(1, len(values) + 1), values, color=colour, linestyle=dashes, linewidth=1.4, label=label)
        axes.set_ylim(bottom=0)
        axes.figure.legend(loc="outside upper left", ncols=2, columnspacing=1.2, handletextpad=0.5)
        return _inline(axes.figure, name, "eigenvector, largest factor first", "factor")


def precisions(series):
    """Draw AP against the step. series: {name: (steps, values)}."""
    return by_step(series, "precisions", "average precision")


def by_step(series, name, label):
    """Draw up to three figures, none negative, against the step. series: {name: (steps, values)}."""
    with _axes(3.1) as axes:
        for (title, points), colour in zip(series.items(), (_WARM, _COOL, _GREY)):
            axes.plot(*points, color=colour, marker="o", markersize=4, label=title)
        axes.set_ylim(0, 1.08 * max((value for _, values in series.values() for value in values), default=0.0) or 1.0)
        axes.locator_params(axis="x", integer=True)
        _legend(axes)
        return _inline(axes.figure, name, "step", label)


# Colours of classes that stand out on light and on dark paper.
_HUES = (
    "#3f7fd0", "#d0731f", "#3d9950", "#d2504f", "#9271cf", "#a0745f", "#cf65a5", "#868686", "#8f8f2e", "#2f97a5",
)  # fmt: skip


def feature_map(groups, rest):
    """Draw places in the plane by class.

    Args:
      groups: (class name, places [n, 2]) of at most twenty classes.
      rest: Places [n, 2] of all other classes, in grey.
    """
    lines = -(-(len(groups) + bool(len(rest))) // 3)
    with _axes(4.2 + 0.19 * lines) as axes:
        if len(rest):
            axes.scatter(*rest.T, s=10, color=_GREY, alpha=0.35, linewidths=0, label="other classes")
        for k, (name, places) in enumerate(groups):
            hue, hollow = _HUES[k % len(_HUES)], k >= len(_HUES)
            axes.scatter(
                *places.T, s=20 if hollow else 13, marker="^" if hollow else "o", edgecolors=hue, linewidths=0.9,
                facecolors="none" if hollow else hue, alpha=0.9, label=name if len(name) < 22 else f"{name[:20]}\u2026",
            )  # fmt: skip
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_aspect("equal", adjustable="datalim")
        axes.figure.legend(
            loc="outside lower left", ncols=3, fontsize=9, handletextpad=0.2, columnspacing=0.8, borderpad=0
        )
        return _inline(axes.figure, "features")


def recalls(curves):
    """Draw precision against recall. curves: {class: precision at equally spaced recalls from 0 to 1}."""
    with _axes(3.6) as axes:
        mean = np.mean(list(curves.values()), 0)
        recall = np.linspace(0, 1, len(mean))
        for values in curves.values():
            axes.plot(recall, values, color=_COOL, linewidth=0.8, alpha=0.75 if len(curves) < 20 else 0.25)
        axes.plot(recall, mean, color=_WARM, linewidth=2.4, label="mean of the classes")
        axes.set_ylim(0, 1.02)
        axes.set_xlim(0, 1)
        _legend(axes)
        return _inline(axes.figure, "recalls", "recall", "precision")


def overlay(curves, name):
    """Draw one metric of several runs against the step. curves: (index into RUN_STYLES, steps, values) of each run."""
    with _axes(3.1) as axes:
        for index, steps, values in curves:
            colour, dashes = RUN_STYLES[index]
            style = (0, dashes) if dashes else "-"
            dot = "o" if len(steps) == 1 else None  # a line of one point is not seen
            axes.plot(steps, values, color=colour, linestyle=style, linewidth=1.6, marker=dot, markersize=4)
        drawn = [value for _, _, values in curves for value in values]
        if min(drawn) > 0 and max(drawn) > 10 * np.median(drawn):
            axes.set_yscale("log")
        axes.locator_params(axis="x", integer=True)
        return _inline(axes.figure, name, "step")


def sample(index):
    """Return a line in the style of a run as an inline SVG, for a legend."""
    colour, dashes = RUN_STYLES[index]
    array = f' stroke-dasharray="{" ".join(f"{2 * d:g}" for d in dashes)}"' if dashes else ""
    line = f'<path d="M1 5H29" fill="none" stroke="var({_VARIABLES[colour]})" stroke-width="2.5"{array}/>'
    return f'<svg viewBox="0 0 30 10" aria-hidden="true" focusable="false">{line}</svg>'


# Light colours of the style sheet, for a chart that stands alone.
_LIGHT = {
    "--ink-2": "#5c574f", "--line": "#dfd9cf", "--warm": "#b8420c", "--cool": "#2a62b8", "--grey": "#857f76"
}  # fmt: skip


def alone(svg):
    """Return an inline chart as an SVG file, on white in the page's light colours."""
    for variable, colour in _LIGHT.items():
        svg = svg.replace(f"var({variable})", colour)
    head = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" font-family="sans-serif"'
    svg = svg.replace("<svg", head, 1)
    return re.sub(r"(<svg[^>]*>)", r'\1<rect width="100%" height="100%" fill="#fff"/>', svg, count=1)


# Colours by method: QB-Heat, another method, an untrained baseline.
KINDS = {"ours": _WARM, "other": _COOL, "baseline": _GREY}


def dots(rows, name, figure_name="top-1"):
    """Draw a dot for each seed and a bar at the mean. rows: (label, key of KINDS, fractions)."""
    with _axes(0.9 + 0.36 * len(rows)) as axes:
        for y, (_, kind, values) in enumerate(rows):
            values = 100 * np.asarray(values)
            axes.scatter(
                values, np.full(len(values), y), s=34, facecolors=(KINDS[kind], 0.4), edgecolors=KINDS[kind],
                linewidths=1.0, zorder=3,
            )  # fmt: skip
            if len(values):
                axes.plot([values.mean()] * 2, [y - 0.3, y + 0.3], color=KINDS[kind], linewidth=1.8)
        axes.set_yticks(range(len(rows)), [label for label, _, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        return _inline(axes.figure, name, f"{figure_name}, %")


_LABELLED = 6  # up to this many labels stand beside their points, more in two columns


def against(points, label, name, figure_name="top-1"):
    """Draw accuracy against a cost. points: (label, key of KINDS, cost, mean, spread or None) of each method."""
    many = len(points) > _LABELLED
    with _axes(3.4 + 0.1 * len(points) * many) as axes:
        for _, kind, cost, mean, spread in points:
            axes.errorbar(
                cost, 100 * mean, None if spread is None else 100 * spread, color=KINDS[kind], marker="o", markersize=6,
                elinewidth=1.4, zorder=3,
            )  # fmt: skip
        costs = [point[2] for point in points]
        if max(costs) > 10 * min(costs):
            axes.set_xscale("log")
        else:
            axes.locator_params(axis="x", nbins=5)
        axes.margins(x=0.7 if many else 0.2, y=0.1)
        axes.set(xlabel=label, ylabel=f"{figure_name}, %")
        axes.figure.draw_without_rendering()
        middle = np.median(costs)
        for side in ("left", "right"):
            _labels(axes, [point for point in points if (point[2] > middle) == (side == "right")], side, many)
        return _inline(axes.figure, name)


def _labels(axes, points, side, column):
    """Label points without overlaps: beside them, or in a column at the side with lines."""
    points = sorted(points, key=lambda point: point[3])
    place = axes.transData + axes.transAxes.inverted()
    own = [place.transform((cost, 100 * mean)) for _, _, cost, mean, _ in points]
    gap = 14 / axes.get_window_extent().height * axes.figure.dpi / 72
    inwards = 0.025 if side == "left" else -0.025
    for (label, kind, cost, mean, _), (x, _), y in zip(points, own, _apart([y for _, y in own], gap)):
        x = (0.0 if side == "left" else 1.0) if column else x
        line = {"arrowstyle": "-", "color": KINDS[kind], "lw": 0.6} if column else None
        axes.annotate(
            label, (cost, 100 * mean), (x + inwards, y), textcoords="axes fraction", ha=side, va="center",
            color=KINDS[kind], arrowprops=line,
        )  # fmt: skip


def _apart(heights, gap):
    """Return ascending heights moved so that neighbours are `gap` apart and none is above 1.

    >>> [round(y, 2) for y in _apart([0.1, 0.1, 0.9, 0.95], 0.1)]
    [0.1, 0.2, 0.9, 1.0]
    """
    moved = []
    for y in heights:
        moved.append(max(y, moved[-1] + gap) if moved else y)
    top = 1.0
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], top)
        top = moved[i] - gap
    return moved


def _legend(axes):
    """Put the legend of the lines drawn above the axes."""
    lines = [line for line in axes.get_lines() if len(line.get_xdata()) and not line.get_label().startswith("_")]
    axes.legend(
        handles=lines, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2, handlelength=1.4,
        columnspacing=1.2, handletextpad=0.5, borderpad=0,
    )  # fmt: skip


def _inline(figure, name, xlabel=None, ylabel=None):
    """Return a figure as <svg> for HTML: without fixed size, fonts or colours, and with ids that begin with `name`."""
    if xlabel:
        figure.axes[0].set_xlabel(xlabel)
    if ylabel:
        figure.axes[0].set_ylabel(ylabel)
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.S)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r'\1 aria-hidden="true" focusable="false"', svg, count=1)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = re.sub(r' font-family: [^;"]*;?', "", svg)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return re.sub(r"\s*\n\s*", "\n", svg).strip()


@contextlib.contextmanager
def _figure(height):
    """Give a matplotlib figure in the report's style, without pyplot and its global state."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(f"a report needs matplotlib ({error}): pip install 'qbheat_jax[report]'") from error
    with matplotlib.rc_context(_STYLE):
        yield Figure(figsize=(_WIDTH, height), layout="constrained")


@contextlib.contextmanager
def _axes(height):
    """Give the one axes of a figure made by `_figure`."""
    with _figure(height) as figure:
        yield figure.subplots()
