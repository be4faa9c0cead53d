"""Part `peers`: time the training of one encoder as a classifier against the same network in PyTorch."""

import os
import statistics

import jax

from qbheat_jax.tools.bench import options, peers, timing
from qbheat_jax.tools.gpu_check import build
from qbheat_jax.train import optim

# Largest relative difference of the losses of equal weights and images; rounding in bfloat16 gives far less.
TOLERANCE = 0.05


def run(job):
    """Time the package against each of PyTorch's ways in turn. The compiled one is last, since it may take too long."""
    peers.need()
    sizes = job.sizes
    bench_options = options.Options(batch=sizes.peer_batch, size=sizes.peer_pixels, dtype=sizes.dtype)
    config = options.supervised(bench_options, job.name)
    job.save(doing="compiling jax's step")
    step = build.step(config)
    step.send()
    losses = {"jax": step.wait()}
    job.save(
        batch=sizes.peer_batch, pixels=sizes.peer_pixels, dtype=sizes.dtype, compile_seconds=step.seconds["compile"]
    )
    candidates = [timing.Candidate("jax", build.sent(step.send, step.wait))]
    for way in sizes.peer_ways:
        job.save(doing=f"compiling torch {way}")
        try:
            send, wait = _peer(job.name, way, config, step)
        except Exception as error:  # a compiler may raise anything; the other ways still count
            job.result["problems"].append(f"torch {way}: {type(error).__name__}: {str(error).strip()[:200]}")
            continue
        job.save(doing=f"timing torch {way}")
        candidates.append(timing.Candidate(f"torch {way}", build.sent(send, wait)))
        losses[f"torch {way}"] = wait()
        with job.turn():
            timed = timing.alternate(candidates, sizes.rounds, sizes.peer_seconds)
            _free()
        figures = {name: found["seconds"] for name, found in timed.items()}
        rates = {name: sizes.peer_batch / statistics.median(seconds) for name, seconds in figures.items()}
        if not abs(losses[f"torch {way}"] / losses["jax"] - 1) < TOLERANCE:
            job.result["problems"].append(f"torch {way}: its loss differs for equal weights and images: {losses}")
        best = max(rate for name, rate in rates.items() if name != "jax")
        job.save(
            first_losses=losses,
            milliseconds={name: [1e3 * s for s in seconds] for name, seconds in figures.items()},
            images_per_second=rates,
            over_best_torch=rates["jax"] / best,
        )


def _peer(name, way, config, step):
    """Return (send, wait) of PyTorch's step with the same weights and batch, after a first step that compiles it."""
    from qbheat_jax.tools.bench.peers import running

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    model = peers.load(peers.build(step.objective.encoder, config.head.classes), name, step.variables)
    peer = running.Peer(model, way, int(os.environ.get("OMP_NUM_THREADS", 1)), config.dtype, device)
    rate, betas = optim.peak_learning_rate(config), (config.adam_b1, config.adam_b2)
    call = peer.step(step.batch, step.objective.pixels, rate, config.weight_decay, betas)
    loss = [call()]

    def send():
        loss[0] = call()

    def wait():
        peer.wait(loss[0])
        return float(loss[0])

    wait()
    _free()
    return send, wait


def _free():
    """Free PyTorch's cached GPU memory for other processes."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
