"""`bench forward` and `bench step`: encoders against their twins in PyTorch, and QB-Heat's step against SimMIM's."""

import dataclasses
import functools
import gc
import logging

import jax
import numpy as np

from qbheat_jax import methods
from qbheat_jax.errors import UserError
from qbheat_jax.models.heads import PooledHead
from qbheat_jax.tools.bench import options, peers, section, timing, training
from qbheat_jax.train import optim

log = logging.getLogger("qbheat")

OURS = "jax"


def forward(o):
    """Yields a section an encoder: images [B, S, S, 3] -> features, running averages in the batch norms."""
    for name in o.encoders:
        yield _features(o, name)
        _forget(o)


def step(o):
    """Yields for each encoder a section of its training as a classifier, and one of its pre-training."""
    for name in o.encoders:
        for make in (_classification, _pretraining):
            yield make(o, name)
            _forget(o)


def _features(o, name):
    limit, notes = timing.Limit(o.limit), []
    step, objective = _supervised(o, name)
    variables, inputs = step.variables(), training.normalised(step.config, step.batch)
    encoder = {kind: tree["encoder"] for kind, tree in variables.items() if "encoder" in tree}
    placed = jax.device_put((encoder, inputs), jax.devices()[0])
    apply = jax.jit(lambda variables, images: objective.encoder.apply(variables, images)[0])

    def ours():
        return apply(*placed)

    def make(peer):
        call = peer.forward(inputs)
        difference = _difference(ours(), call())
        notes.append(f"torch {peer.way}: features differ by at most {difference:.1e} of their scale from {OURS}")
        return call

    runs = {OURS: timing.on_device(ours), **_peers(o, name, objective, variables, make)}
    return _against_peers("forward", f"forward of {name}", o, runs, limit, notes)


def _supervised(o, name):
    """(training.Step, objective) of an encoder and a linear classifier on its features."""
    config = options.supervised(o, name)
    objective = dataclasses.replace(methods.build(config), head=PooledHead(o.classes))
    log.info("%s: making its parameters", name)
    return training.Step(config, objective), objective


def _peers(o, name, objective, variables, make):
    """{name of a way: its `run`} of the encoder's twin, which is made when the first of them is used.

    make: function of a running.Peer that returns what to time. Where a compiler fails, the run raises timing.NotTimed.
    """
    if not o.peers:
        return {}
    peers.need()
    from qbheat_jax.tools.bench.peers import running

    device = {"gpu": "cuda"}.get(jax.default_backend(), "cpu")
    running.check(device)

    @functools.cache
    def model():
        return peers.load(peers.build(objective.encoder, o.classes), name, variables)

    def run(way):
        log.info("%s: torch %s", name, way)
        peer = running.Peer(model(), way, o.threads, o.dtype, device)
        try:
            call = make(peer)
            call()
        except UserError:
            raise
        except Exception as error:  # a compiler may fail in any way, and then the others are still of interest
            if way != "compile":
                raise
            words = str(error).strip().splitlines() or [""]
            reason = f"torch compile does not work here: {type(error).__name__}: {words[0][:200]}"
            raise timing.NotTimed(reason) from None
        return timing.on_device(call, peer.wait)

    return {f"torch {way}": timing.lazy(functools.partial(run, way)) for way in o.peers}


def _against_peers(part, what, o, runs, limit, notes=()):
    candidates = [timing.Candidate(way, run, o.batch) for way, run in runs.items()]
    log.info("%s: timing %s", what, ", ".join(runs))
    figures = timing.alternate(candidates, o.rounds, o.seconds, limit)
    ratios, others = [], [way for way in figures if way != OURS]
    if OURS in figures and others:
        best = timing.fastest(figures, others)
        speed = timing.ratio(figures[best]["seconds"], figures[OURS]["seconds"])
        ratios.append((f"images/s of {OURS} over those of the best PyTorch, {best}", speed))
    title = f"{what}, batch {o.batch}, {o.size} px, {o.dtype}"
    return section.make(part, title, "images/s", candidates, figures, ratios, limit, notes)


def _classification(o, name):
    """The whole step of supervised training: cross-entropy of a linear classifier, gradients, AdamW."""
    limit = timing.Limit(o.limit)
    ours, objective = _supervised(o, name)
    config = ours.config
    rate, betas = optim.peak_learning_rate(config), (config.adam_b1, config.adam_b2)

    def make(peer):
        return peer.step(ours.batch, objective.pixels, rate, config.weight_decay, betas)

    runs = {OURS: timing.on_device(ours.call), **_peers(o, name, objective, ours.variables(), make)}
    return _against_peers("step", f"training {name}", o, runs, limit)


def _pretraining(o, name):
    """QB-Heat's whole step and SimMIM's on full images, same encoder and batch."""
    limit = timing.Limit(o.limit)

    def run(which):
        config = options.pretraining(o, name, which)
        log.info("%s: making the parameters of %s", name, which)
        return timing.on_device(training.Step(config, methods.build(config)).call)

    runs = {which: timing.lazy(functools.partial(run, which)) for which in ("qbheat", "simmim")}
    candidates = [timing.Candidate(which, run, o.batch) for which, run in runs.items()]
    figures = timing.alternate(candidates, o.rounds, o.seconds, limit)
    seconds = {which: figure["seconds"] for which, figure in figures.items()}
    pairs = [("cost of QB-Heat's step over SimMIM's, which sees the full image", "qbheat", "simmim")]
    title = f"pre-training {name}, batch {o.batch}, {o.pretrain_size} px, {o.dtype}"
    return section.make("step", title, "images/s", candidates, figures, timing.ratios(seconds, pairs), limit)


def _difference(ours, theirs):
    """Largest difference of two feature maps over the largest feature."""
    ours, theirs = np.asarray(ours, np.float32), theirs.float().cpu().numpy()
    return np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-30)


def _forget(o):
    """Free what the last section held: programs, the arrays they were called with, and PyTorch's part of the GPU."""
    jax.clear_caches()
    gc.collect()
    if o.peers:
        from qbheat_jax.tools.bench.peers import running

        running.free()
