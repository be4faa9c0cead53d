"""Format a benchmark's result as Markdown: the machine, then a table and its ratios for each section."""

GIB = 2**30


def text(result):
    """Return the whole result as text."""
    return "\n".join([*_machine(result), *(line for s in result["sections"] for line in _section(s))])


def newest(result):
    """Return the newest part of `text`: the last section, or the head before the first section."""
    return "\n".join(_section(result["sections"][-1]) if result["sections"] else _machine(result))


def _machine(result):
    m, o = result["machine"], result["options"]
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
    yield f"# qbheat bench {o['what']}"
    yield ""
    yield f"* {m['processor'] or 'processor unknown'}, {m['cores']} cores, device {m['device']}, {m['platform']}"
    yield f"* Python {m['python']}, {versions}"
    yield f"* threads of every framework: {m['threads']}; GLIBC_TUNABLES={m['GLIBC_TUNABLES'] or 'not set'}"
    if m["sends_ahead"]:
        yield "* jax and PyTorch send all calls of a run, then wait for the last one"
    if m["jax_memory_fraction"]:
        yield f"* jax uses {m['jax_memory_fraction']} of the GPU's memory"
    yield (
        f"* median (min to max) of {o['rounds']} rounds in one process, after a warm-up; the candidates of a table take turns, "
        "in reverse order every second round, and the first call of a turn does not count"
    )
    yield "* ratios are computed round by round"


def _section(s):
    unit = s["unit"]
    yield from ("", f"## {s['title']}", "")
    heads = ["", *([unit] if unit else []), "ms a call"]
    yield _row(heads)
    yield _row(["---", *["---:"] * (len(heads) - 1)])
    for row in s["rows"]:
        rate = [_spread(row["rate"])] if unit else []
        yield _row([row["name"], *rate, _spread(row["milliseconds"])])
    yield ""
    for ratio in s["ratios"]:
        yield f"* {ratio['name']}: **{ratio['median']:.2f}** ({ratio['min']:.2f} to {ratio['max']:.2f})"
    for note in s["notes"]:
        yield f"* {note}"
    if s["peak_bytes"] is not None:
        yield f"* peak memory of the process so far: {s['peak_bytes'] / GIB:.2f} GiB"


def _row(cells):
    return f"| {' | '.join(cells)} |"


def _spread(figure):
    return f"{_number(figure['median'])} ({_number(figure['min'])} to {_number(figure['max'])})"


def _number(x):
    """Return a number with about three significant digits.

    >>> _number(1234.5), _number(12.34), _number(0.01234)
    ('1,234', '12.3', '0.0123')
    """
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"
