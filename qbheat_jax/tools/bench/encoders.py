"""`bench forward` and `bench step`: encoders against their PyTorch counterparts, and QB-Heat's step against SimMIM's."""

import dataclasses
import functools
import gc
import logging

import jax
import numpy as np

from qbheat_jax import methods
from qbheat_jax.errors import UserError
from qbheat_jax.models import registry
from qbheat_jax.models.heads import PooledHead
from qbheat_jax.tools.bench import options, peers, section, timing, training
from qbheat_jax.train import optim

log = logging.getLogger("qbheat")

OURS = "jax"


def forward(o):
    """Yield a section per encoder, and one for its folded form if it has any: features of images [B, S, S, 3] in inference.

    Args:
      o: A checked `options.Options`.
    """
    for name in o.encoders:
        for folded in (False, True) if registry.encoder(name).fold else (False,):
            yield _features(o, name, folded)
            _forget(o)


def step(o):
    """Yield two sections per encoder: training as a classifier, and pre-training.

    Args:
      o: A checked `options.Options`.
    """
    for name in o.encoders:
        for make in (_classification, _pretraining):
            yield make(o, name)
            _forget(o)


def _features(o, name, folded):
    limit, notes = timing.Limit(o.limit), []
    step, objective = _supervised(o, name)
    variables, inputs = step.variables(), training.normalised(step.config, step.batch)
    if folded:
        objective, variables = _folded(o, objective, variables)
    encoder = {kind: tree["encoder"] for kind, tree in variables.items() if "encoder" in tree}
    placed = jax.device_put((encoder, inputs), jax.devices()[0])
    apply = jax.jit(lambda variables, images: objective.encoder.apply(variables, images)[0])

    def ours():
        return apply(*placed)

    def make(peer):
        call = peer.forward(inputs)
        difference = _difference(ours(), call())
        notes.append(
            f"torch {peer.way}: features differ from {OURS} by at most {difference:.1e} of the largest feature"
        )
        return call

    runs = {OURS: timing.on_device(ours), **_peers(o, name, objective, variables, make)}
    form = ", folded" if folded else ""
    return _against_peers("forward", f"forward of {name}{form}", o, runs, limit, notes)


def _folded(o, objective, variables):
    """Return (objective, variables) with the encoder folded for the images of the benchmark."""
    made = objective.encoder.fold(variables["params"]["encoder"], o.size)
    objective = dataclasses.replace(objective, encoder=objective.encoder.clone(**made.options))
    return objective, {**variables, "params": {**variables["params"], "encoder": made.params}}


def _supervised(o, name):
    """Return (training.Step, objective) of an encoder with a linear classifier on its features."""
    config = options.supervised(o, name)
    objective = dataclasses.replace(methods.build(config), head=PooledHead(o.classes))
    log.info("%s: initialising its parameters", name)
    return training.Step(config, objective), objective


def _peers(o, name, objective, variables, make):
    """Return {name: `run` function} of the encoder's PyTorch counterpart in each way.

    The first run creates the PyTorch model. If PyTorch's compiler fails, the run raises `timing.NotTimed`.

    Args:
      o: A checked `options.Options`.
      name: Name of the encoder.
      objective: Object with the encoder.
      variables: Variables of the encoder and head, {"params": ..., ...}.
      make: Function of a `running.Peer` that returns the function to time.
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
        except Exception as error:  # a compiler may raise anything; the other ways still count
            if way != "compile":
                raise
            words = str(error).strip().splitlines() or [""]
            reason = f"torch compile fails on this machine: {type(error).__name__}: {words[0][:200]}"
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
        ratios.append((f"images/s of {OURS} over the fastest PyTorch, {best}", speed))
    title = f"{what}, batch {o.batch}, {o.size} px, {o.dtype}"
    return section.make(part, title, "images/s", candidates, figures, ratios, limit, notes)


def _classification(o, name):
    """Return the section of a full supervised step: cross-entropy of a linear classifier, gradients and AdamW."""
    limit = timing.Limit(o.limit)
    ours, objective = _supervised(o, name)
    config = ours.config
    rate, betas = optim.peak_learning_rate(config), (config.adam_b1, config.adam_b2)

    def make(peer):
        return peer.step(ours.batch, objective.pixels, rate, config.weight_decay, betas)

    runs = {OURS: timing.on_device(ours.call), **_peers(o, name, objective, ours.variables(), make)}
    return _against_peers("step", f"training {name}", o, runs, limit)


def _pretraining(o, name):
    """Return the section of QB-Heat's full step against SimMIM's, with the same encoder and batch."""
    limit = timing.Limit(o.limit)

    def run(which):
        config = options.pretraining(o, name, which)
        log.info("%s: initialising the parameters of %s", name, which)
        return timing.on_device(training.Step(config, methods.build(config)).call)

    runs = {which: timing.lazy(functools.partial(run, which)) for which in ("qbheat", "simmim")}
    candidates = [timing.Candidate(which, run, o.batch) for which, run in runs.items()]
    figures = timing.alternate(candidates, o.rounds, o.seconds, limit)
    seconds = {which: figure["seconds"] for which, figure in figures.items()}
    pairs = [("time of QB-Heat's step over SimMIM's, which encodes the full image", "qbheat", "simmim")]
    title = f"pre-training {name}, batch {o.batch}, {o.pretrain_size} px, {o.dtype}"
    return section.make("step", title, "images/s", candidates, figures, timing.ratios(seconds, pairs), limit)


def _difference(ours, theirs):
    """Return the largest difference of two feature maps, relative to the largest feature."""
    ours, theirs = np.asarray(ours, np.float32), theirs.float().cpu().numpy()
    return np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-30)


def _forget(o):
    """Free the last section's compiled programs, their arrays, and PyTorch's GPU memory."""
    jax.clear_caches()
    gc.collect()
    if o.peers:
        from qbheat_jax.tools.bench.peers import running

        running.free()
