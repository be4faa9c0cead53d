"""Format a preflight result, a JSON-ready dict, as text."""

GIB, MIB = 2**30, 2**20


def text(result):
    """Return the report of a result of `preflight.check`, about thirty lines."""
    lines = [_head(result), "", *_memory(result), *_work(result), *_collectives(result), *_bounds(result)]
    lines += [f"warning: {words}" for words in result["warnings"]]
    if result.get("search"):
        lines += ["", *_search(result["search"])]
    return "\n".join(lines)


def _head(r):
    mesh = " x ".join(f"{axis} {n}" for axis, n in r["mesh"].items())
    program = ", forward pass," if r["program"] == "forward pass" else ""
    devices = f"{r['chips']} chips" if r["hbm_bytes"] else f"{r['devices']} devices"
    return (
        f"{r['config']}{program} on {r['topology']}: {devices}, mesh {mesh}, batch {r['batch_size']} "
        f"({r['images_per_device']} images per device)"
    )


def _row(name, words):
    return f"{name:22} {words}"


def _memory(r):
    fits = {True: "fits", False: "DOES NOT FIT", None: "not known"}[r["fits"]]
    fits, reason = ("DOES NOT COMPILE", r["error"]) if r["error"] else (fits, r["reason"])
    yield _row("verdict", fits + (f": {reason}" if reason else ""))
    if r["compile_seconds"]:
        yield _row("compiled in", f"{r['compile_seconds']:.0f} s, by {r['compiler']}")
    yield _row("parameters", f"{r['parameters']:,}")
    of = f" of {r['hbm_bytes'] / GIB:.1f} GiB HBM" if r["hbm_bytes"] else ""
    yield _row("state a device", f"{_size(r['state_bytes'])}; with its batch {_size(r['argument_bytes'])}{of}")
    if r["memory"]:
        m = r["memory"]
        words = f"arguments {_size(m['argument'])}, temporary {_size(m['temp'])}, code {_size(m['generated_code'])}"
        if r["needed_bytes"]:
            words += f"; {_size(r['needed_bytes'])} in total, {r['needed_bytes'] / r['hbm_bytes']:.0%} of the GPU"
        elif r["fits"]:
            words += " (for information; the verdict decides)"
        yield _row("compiler's figures", words)


def _work(r):
    image = r["product_flops"] / r["batch_size"]
    types = ", ".join(f"{name} {n / r['product_flops']:.1%}" for name, n in r["product_flops_by_type"].items())
    yield _row("model FLOPs a step", f"{r['product_flops']:.4g} in matmuls and convolutions ({types})")
    yield _row("", f"{image:.4g} per image; {r['flops']:.4g} per step including elementwise arithmetic")
    if r["bytes_accessed"] is not None:
        least = "the gradient's activations and the state, written once and read once"
        if r["program"] == "forward pass":
            least = "the weights and the images, read once"
        padding = f"; {_size(r['bytes_padding'])} more of tile padding" if r["bytes_padding"] else ""
        yield _row("HBM bytes a device", f"{_size(r['bytes_accessed'])} per step ({r['bytes_counted']}){padding}")
        yield _row(
            "",
            f"{r['bytes_accessed'] / r['least_bytes']:.2f} times the least traffic, {_size(r['least_bytes'])}: {least}",
        )
        largest = list(r["bytes_by_part"].items())[:6]
        yield _row("", ", ".join(f"{part} {n / r['bytes_accessed']:.0%}" for part, n in largest))
    if r["launches"]:
        kinds = ", ".join(f"{n:,} {kind}" for kind, n in r["launches"].items())
        yield _row("kernels a step", f"{sum(r['launches'].values()):,}: {kinds}")


def _collectives(r):
    if r["collectives"] is None:
        return
    if not r["collectives"]:
        yield _row("collectives", "none")
    over = " over NVLink" if r["launches"] else ""
    for kind, c in sorted(r["collectives"].items()):
        yield _row(
            kind, f"{c['count']} per step, {_size(c['bytes'])} per device; at least {_size(c['sent'])} to send{over}"
        )


def _bounds(r):
    if not r["bounds"]:
        if not r["hbm_bytes"]:
            yield _row("floors", f"not known for {r['topology']}: {r['not_known']}")
        return
    b = r["bounds"]
    floors = ", ".join(f"{name} {seconds * 1e3:.2f} ms" for name, seconds in r["floors"].items())
    yield _row("a step takes at least", f"{floors}; {b['binds']} binds")
    yield _row(
        "upper bounds",
        f"{b['images_per_second_per_chip_at_most']:,.0f} images/s per chip, MFU {b['mfu_at_most']:.0%}; not a prediction: a "
        "real step is slower",
    )
    if r["not_known"]:
        yield _row("not known", r["not_known"])


def _search(tried):
    yield "largest batch that fits"
    for row in tried:
        yield f"  {row['batch_size']:>8}  {'fits' if row['fits'] else row['reason']}  ({row['compile_seconds']:.0f} s)"


def _size(n):
    return f"{n / GIB:.2f} GiB" if n >= GIB else f"{n / MIB:.1f} MiB"
