"""`bench forward` and `bench step`: encoders against their twins in PyTorch, and QB-Heat's step against SimMIM's."""

import dataclasses
import gc
import logging

import jax
import numpy as np

from qbheat_jax import objectives, optim
from qbheat_jax.bench import options, peers, section, timing, training
from qbheat_jax.errors import UserError
from qbheat_jax.models.heads import PooledHead

log = logging.getLogger("qbheat")

OURS = "jax"


def forward(o):
    """Yields a section an encoder: images [B, S, S, 3] -> features, running averages in the batch norms."""
    for name in o.encoders:
        step, objective = _supervised(o, name)
        variables, inputs = step.variables(), training.normalised(step.config, step.batch)
        encoder = {kind: tree["encoder"] for kind, tree in variables.items() if "encoder" in tree}
        placed = jax.device_put((encoder, inputs), jax.devices()[0])
        apply = jax.jit(lambda variables, images: objective.encoder.apply(variables, images)[0])

        def ours():
            return jax.block_until_ready(apply(*placed))

        calls, notes = _peers(o, name, objective, variables, lambda peer: peer.forward(inputs))
        for way, call in calls.items():
            notes.append(
                f"{way}: features differ by at most {_difference(ours(), call()):.1e} of their scale from {OURS}"
            )
        yield _against_peers("forward", f"forward of {name}", o, {OURS: ours, **calls}, notes)
        _forget()


def step(o):
    """Yields for each encoder a section of its training as a classifier, and one of its pre-training."""
    for name in o.encoders:
        for make in (_classification, _pretraining):
            yield make(o, name)
            _forget()


def _supervised(o, name):
    """(training.Step, objective) of an encoder and a linear classifier on its features."""
    config = options.supervised(o, name)
    objective = dataclasses.replace(objectives.build(config), head=PooledHead(o.classes))
    log.info("%s: making its parameters", name)
    return training.Step(config, objective), objective


def _peers(o, name, objective, variables, make):
    """({name of a way: function to time}, notes) of the encoder's twin; a way that does not work is a note."""
    calls, notes = {}, []
    if not o.peers:
        return calls, notes
    peers.need()
    from qbheat_jax.bench.peers import running

    device = {"gpu": "cuda"}.get(jax.default_backend(), "cpu")
    model = peers.load(peers.build(objective.encoder, o.classes), name, variables)
    for way in o.peers:
        log.info("%s: torch %s", name, way)
        call = make(running.Peer(model, way, o.threads, o.dtype, device))
        try:
            call()
        except UserError:
            raise
        except Exception as error:  # a compiler may fail in any way, and then the others are still of interest
            if way != "compile":
                raise
            words = str(error).strip().splitlines() or [""]
            notes.append(f"torch compile does not work here: {type(error).__name__}: {words[0][:200]}")
            continue
        calls[f"torch {way}"] = call
    return calls, notes


def _against_peers(part, what, o, calls, notes):
    candidates = [timing.Candidate(way, timing.repeated(call), o.batch) for way, call in calls.items()]
    log.info("%s: timing %s", what, ", ".join(calls))
    figures = timing.alternate(candidates, o.rounds, o.seconds)
    ratios, others = [], [way for way in calls if way != OURS]
    if others:
        best = timing.fastest(figures, others)
        speed = timing.ratio(figures[best]["seconds"], figures[OURS]["seconds"])
        ratios.append((f"images/s of {OURS} over those of the best PyTorch, {best}", speed))
    title = f"{what}, batch {o.batch}, {o.size} px, {o.dtype}"
    return section.make(part, title, "images/s", candidates, figures, ratios, notes)


def _classification(o, name):
    """The whole step of supervised training: cross-entropy of a linear classifier, gradients, AdamW."""
    ours, objective = _supervised(o, name)
    config = ours.config
    rate, betas = optim.peak_learning_rate(config), (config.adam_b1, config.adam_b2)

    def make(peer):
        return peer.step(ours.batch, objective.pixels, rate, config.weight_decay, betas)

    calls, notes = _peers(o, name, objective, ours.variables(), make)
    return _against_peers("step", f"training {name}", o, {OURS: ours.call, **calls}, notes)


def _pretraining(o, name):
    """QB-Heat's whole step and SimMIM's on full images, same encoder and batch."""
    calls = {}
    for objective in ("qbheat", "simmim"):
        config = options.pretraining(o, name, objective)
        log.info("%s: making the parameters of %s", name, objective)
        calls[objective] = training.Step(config, objectives.build(config)).call
    candidates = [timing.Candidate(which, timing.repeated(call), o.batch) for which, call in calls.items()]
    figures = timing.alternate(candidates, o.rounds, o.seconds)
    cost = timing.ratio(figures["qbheat"]["seconds"], figures["simmim"]["seconds"])
    title = f"pre-training {name}, batch {o.batch}, {o.pretrain_size} px, {o.dtype}"
    ratios = [("cost of QB-Heat's step over SimMIM's, which sees the full image", cost)]
    return section.make("step", title, "images/s", candidates, figures, ratios)


def _difference(ours, theirs):
    """Largest difference of two feature maps over the largest feature."""
    ours, theirs = np.asarray(ours, np.float32), theirs.float().cpu().numpy()
    return np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-30)


def _forget():
    """Frees what the last section held: programs, and the arrays they were called with."""
    jax.clear_caches()
    gc.collect()
