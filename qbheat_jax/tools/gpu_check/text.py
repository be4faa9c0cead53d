"""Format the result of a GPU check, a JSON-ready dict, as Markdown."""

import statistics

GIB = 2**30
_NAME = 90
_VERDICTS = {True: "passed", False: "NOT PASSED", None: "not finished"}


def markdown(result):
    """Return the report of a result. Parts and their findings may be missing."""
    lines = [*_machine(result), ""]
    for name, part in result["parts"].items():
        lines += [f"## `{name}`: {_VERDICTS[part['passed']]}", "", f"{part['question']} "]
        lines[-1] += f"({part['seconds']:.0f} s of at most {part['limit']:.0f} s)"
        lines += ["", *_TABLES[name](part["jobs"]), "", *_failures(part["jobs"])]
    return "\n".join(lines).rstrip() + "\n"


def _machine(result):
    m = result["machine"]
    memory = f", {m['memory_bytes'] / GIB:.0f} GiB for jax" if m["memory_bytes"] else ""
    tiny = " TINY SIZES: this tests the program, not the machine." if result["tiny"] else ""
    compiled = " It reused programs that an earlier check compiled." if m["compiled_before"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
    yield "# GPU check"
    yield ""
    driver = f"; driver {m['driver']}" if m["driver"] else ""
    flags = f" XLA_FLAGS: `{m['XLA_FLAGS']}`." if m["XLA_FLAGS"] else ""
    yield f"{m['device']} ({m['devices']} devices{memory}{driver}), {m['cores']} CPU cores.{tiny}{compiled}"
    yield f"Python {m['python']}, {versions}.{flags}"


def _failures(jobs):
    failed = {name: outcome for name, outcome in jobs.items() if outcome["state"] != "passed"}
    for name, outcome in failed.items():
        yield f"* `{name}`: **{outcome['state']}** after {outcome['seconds']:.0f} s: {outcome['error']}"
    if failed:
        yield ""


def _table(head, rows):
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _values(jobs):
    def cells(result):
        for dtype in ("float32", "bfloat16"):
            errors = result.get(dtype)
            yield from (f"{errors[n]:.1e}" for n in ("features", "gradients")) if errors else ("-", "-")
            yield f"{errors['block']:.1e} {errors['block_name']}" if errors else "-"

    errors = ("features", "gradients", "worst block")
    head = ["errors over size", *(f"{dtype} {name}" for dtype in ("f32", "bf16") for name in errors)]
    yield from _table(head, ([f"`{name}`", *cells(outcome["result"])] for name, outcome in jobs.items()))


def _resume(jobs):
    rows = []
    for name, outcome in jobs.items():
        for which, run in outcome["result"].get("runs", {}).items():
            found = "bitwise" in run
            verdict = {True: "yes", False: "no"}[run["bitwise"]] if found else "-"
            largest = f"{run['largest']:.1e}" if found else "-"
            rows.append([name, which, str(run.get("resumed_at", "-")), verdict, largest])
    head = ["XLA_FLAGS", "resumed by", "resumed at step", "bit for bit", "largest difference over size"]
    yield from _table(head, rows)


def _objectives(jobs):
    def losses(outcome):
        return ", ".join(f"{loss:.4f}" for loss in outcome["result"].get("losses", [])) or "-"

    rows = ([f"`{name}`", losses(outcome), f"{outcome['seconds']:.0f}"] for name, outcome in jobs.items())
    yield from _table(["objective", "loss of each step", "s"], rows)


def _steps(jobs):
    def row(name, r):
        if "milliseconds" not in r:
            return [
                f"`{name}`",
                str(r.get("batch", "-")),
                *["-"] * 6,
                f"{r['compile_seconds']:.0f}" if "compile_seconds" in r else "-",
                "-",
            ]
        mfu = f"{r['mfu']:.1%}" if r["mfu"] is not None else "-"
        peak = f"{r['peak_bytes'] / GIB:.2f}" if r["peak_bytes"] else "-"
        traced = [f"{r['kernel_ms']:.2f}", f"{r['launches']:,.0f}"] if "launches" in r else ["-", "-"]
        rate, compiled = f"{r['images_per_second']:,.0f}", f"{r['compile_seconds']:.0f}"
        return [
            f"`{name}`", str(r["batch"]), f"{statistics.median(r['milliseconds']):.2f}", rate, mfu, *traced,
            f"{r['gflops_per_image']:.1f}", compiled, peak,
        ]  # fmt: skip

    results = {name: outcome["result"] for name, outcome in jobs.items()}
    speed = ["encoder", "batch", "ms a step", "images/s", "MFU", "kernels, ms", "launches a step"]
    head = [*speed, "GFLOPs an image", "s to compile", "peak GiB"]
    yield from _table(head, (row(name, r) for name, r in results.items()))
    for name, r in results.items():
        if "kernels" in r:
            yield ""
            yield f"Longest kernels of a step, {name}, batch {r['batch']}, {r['pixels']} px, {r['dtype']}:"
            yield ""
            rows = ([f"{k['ms']:.3f}", f"{k['times']:.4g}", f"`{k['name'][:_NAME]}`"] for k in r["kernels"])
            yield from _table(["ms", "times", "kernel"], rows)


def _peers(jobs):
    rows = []
    for name, outcome in jobs.items():
        r = outcome["result"]
        for which, rate in r.get("images_per_second", {}).items():
            milliseconds = statistics.median(r["milliseconds"][which])
            over = f"{r['over_best_torch']:.2f}" if which == "jax" else ""
            loss = f"{r['first_losses'][which]:.4f}"
            rows.append([f"`{name}`", which, str(r["batch"]), f"{milliseconds:.2f}", f"{rate:,.0f}", over, loss])
    head = ["classifier", "by", "batch", "ms a step", "images/s", "over the best of torch", "loss of the first step"]
    yield from _table(head, rows)


_TABLES = {"values": _values, "resume": _resume, "objectives": _objectives, "steps": _steps, "peers": _peers}
