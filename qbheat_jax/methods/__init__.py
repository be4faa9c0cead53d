"""What is learnt from: one file a method, built from a config by `build`.

Each has `encoder`, `pixels`, `init(rng, batch) -> variables` and `loss(params, mutable, batch, rng, train) -> (loss,
(mutable, metrics))`. One that needs two crops of every image says `views = 2`; one whose state follows its parameters
says in `started(variables)` what else begins when some parts begin with given weights.
"""

import jax.numpy as jnp

from qbheat_jax.errors import UserError
from qbheat_jax.methods.common.targets import Target
from qbheat_jax.methods.dense import Dense
from qbheat_jax.methods.detr import Detr
from qbheat_jax.methods.finetune import Finetune
from qbheat_jax.methods.mae import MAE, MaskDecoder, kept
from qbheat_jax.methods.moco import Colours, MoCo, Projector
from qbheat_jax.methods.qbheat import QBHeat
from qbheat_jax.methods.simmim import SimMIM
from qbheat_jax.methods.supervised import Supervised
from qbheat_jax.models import registry
from qbheat_jax.models.decoder import HeatDecoder
from qbheat_jax.models.dense_detector import DenseDetector
from qbheat_jax.models.detr_detector import DETR
from qbheat_jax.models.ghost_batch_norm import grouped
from qbheat_jax.models.pyramid import GroupNorm
from qbheat_jax.ops import colour, heat, images, quarters


def build_encoder(config):
    """The encoder of any config that has `encoder` fields. Raises UserError where they do not go together."""
    fields = config.encoder
    options = {name: fields[name] for name in ("class_token", "position", "grid") if fields[name] != _PLAIN[name]}
    options["remat"] = config.get("remat", "none")  # a probe's or a ported checkpoint's config has none
    return registry.encoder(
        fields.name, stride=fields.stride, drop_path=fields.drop_path, dtype=config.dtype, **options
    )


def build(config):
    """The objective of a run's or a ported checkpoint's config. Raises UserError where its fields do not go together."""
    encoder = build_encoder(config)
    _check_size(config, encoder)
    if encoder.has_batch_norm:
        encoder = grouped(encoder, config.get("bn_groups", 1))
    return _BUILD[config.objective](config, encoder, images.PIXELS[config.pixels])


def views(objective):
    """How many crops of every image the objective's batches have."""
    return getattr(objective, "views", 1)


def _qbheat(config, encoder, pixels):
    placements = quarters.PLACEMENT_SETS[config.quarter.placements]
    _check_grid(config, encoder, placements)
    target = _target(config, encoder)
    decoder = HeatDecoder(
        outputs=sum(target.widths.values()),
        heat=heat.Heat(**config.heat.to_dict()),
        placements=placements,
        **_decoder(config),
    )
    return QBHeat(encoder, decoder, target, config.loss_on, pixels)


def _moco(config, encoder, pixels):
    fields = config.moco
    if fields.queue % config.batch_size:
        raise UserError(
            f"config field moco.queue={fields.queue} is not accepted: it takes a multiple of "
            f"batch_size={config.batch_size}"
        )
    colours = Colours(blur_prob=fields.blur_share, sigma=fields.blur_sigma)
    projector = Projector(fields.width, fields.standardise)
    return MoCo(encoder, projector, fields.queue, fields.momentum, fields.temperature, colours, pixels)


def _mae(config, encoder, pixels):
    if not encoder.takes_keep:
        raise UserError(
            f"config field encoder.name={config.encoder.name!r} is not accepted with objective='mae', which leaves cells "
            "out: it takes vit_ti, vit_s or vit_b (objective='simmim' masks images for any encoder)"
        )
    ratio, cells = config.mae.mask_ratio, (config.image_size // encoder.stride) ** 2
    if not 0 < kept(cells, ratio) < cells:
        raise UserError(
            f"config field mae.mask_ratio={ratio} is not accepted: of the {cells} cells of an image of "
            f"image_size={config.image_size} it must keep and mask at least one each"
        )
    target = _target(config, encoder)
    decoder = MaskDecoder(sum(target.widths.values()), **_decoder(config))
    return MAE(encoder, decoder, target, ratio, config.loss_on, pixels)


def _simmim(config, encoder, pixels):
    size = config.simmim.mask_size
    if size % encoder.stride or config.image_size % size:
        raise UserError(
            f"config field simmim.mask_size={size} is not accepted: it takes a multiple of the stride of "
            f"{config.encoder.name}, {encoder.stride}, that divides image_size={config.image_size}"
        )
    fields, target = config.simmim, _target(config, encoder)
    return SimMIM(encoder, target, size, fields.mask_ratio, fields.error, config.loss_on, pixels)


def _supervised(config, encoder, pixels):
    strength = config.supervised.colour_jitter
    jitter = colour.Jitter(strength, strength, strength)
    return Supervised(encoder, _head(config), pixels, config.supervised.label_smoothing, jitter)


def _classifier(config, encoder, pixels):
    return Supervised(encoder, _head(config), pixels)


def _finetune(config, encoder, pixels):
    head = registry.head(config.encoder.name, config.head.classes, config.head.dropout, config.dtype)
    head = grouped(head, config.bn_groups)
    return Finetune(
        encoder, head, pixels, label_smoothing=config.label_smoothing, mixup=config.mixup, cutmix=config.cutmix
    )


def _dense(config, encoder, pixels):
    fields, strides = config.dense, tuple(int(s) for s in config.dense.strides)
    if any(b != 2 * a for a, b in zip(strides, strides[1:])) or strides[0] & (strides[0] - 1):
        raise UserError(
            f"config field dense.strides={strides} is not accepted: it takes powers of two, each twice the one before"
        )
    if config.image_size % strides[-1]:
        raise UserError(
            f"config field image_size={config.image_size} is not accepted: it takes a multiple of the largest of "
            f"dense.strides={strides}"
        )
    if fields.width % GroupNorm.num_groups:
        raise UserError(f"config field dense.width={fields.width} is not accepted: it takes a multiple of 8")
    detector = DenseDetector(config.detector.classes, strides, fields.width, fields.depth, jnp.dtype(config.dtype))
    return Dense(encoder, detector, pixels, config.tune, config.detector.stages, config.detector.count)


def _detr(config, encoder, pixels):
    fields = config.detr
    if fields.queries < config.data.max_boxes:
        raise UserError(
            f"config field detr.queries={fields.queries} is not accepted: it takes data.max_boxes={config.data.max_boxes} or "
            "more, one for each box"
        )
    detector = DETR(config.detector.classes, **fields, dtype=jnp.dtype(config.dtype))
    return Detr(encoder, detector, pixels, config.tune, count=config.detector.count)


_BUILD = {
    "qbheat": _qbheat,
    "moco": _moco,
    "mae": _mae,
    "simmim": _simmim,
    "supervised": _supervised,
    "classifier": _classifier,
    "finetune": _finetune,
    "dense": _dense,
    "detr": _detr,
}


def _head(config):
    """None as long as the number of classes is not known."""
    classes = config.head.classes
    head = registry.head(config.encoder.name, classes, dtype=config.dtype) if classes else None
    return grouped(head, config.get("bn_groups", 1))


def _target(config, encoder):
    return Target(encoder.stride, config.norm_pix, config.norm_pix_statistics, config.hog)


def _decoder(config):
    return {**config.decoder.to_dict(), "dtype": jnp.dtype(config.dtype), "remat": config.remat}


# Only a vit has these, so the others are not given them.
_PLAIN = {"class_token": False, "position": "sincos", "grid": 0}


def _check_size(config, encoder):
    if config.image_size % encoder.stride:
        raise UserError(
            f"config field image_size={config.image_size} is not accepted: {config.encoder.name} takes a multiple of "
            f"its stride, {encoder.stride}"
        )


def _check_grid(config, encoder, placements):
    cells = config.image_size // encoder.stride
    try:
        quarters.check_grid(cells, cells, placements)
    except UserError as error:
        raise UserError(f"config field image_size={config.image_size} with stride {encoder.stride}: {error}") from error
