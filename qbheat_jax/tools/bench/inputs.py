"""`bench input`: time the tf.data pipeline and the device cache against plain decoding and resizing, the floor."""

import contextlib
import tempfile

import jax

from qbheat_jax import data, device_mesh
from qbheat_jax.data import augment, decode, device_cache
from qbheat_jax.data.fields import DATA
from qbheat_jax.data.specs import image
from qbheat_jax.errors import UserError
from qbheat_jax.tools.bench import photographs, section, timing

FLOOR, PIPELINE, CACHE = "floor: one loop, one thread", "tf.data pipeline", "device_cache"


def check():
    """Raise UserError where tensorflow is missing."""
    try:
        import qbheat_jax.data.pipeline  # noqa: F401
    except ImportError as error:
        raise UserError(f"bench input times tensorflow's pipeline, and it is missing ({error})") from None


def run(o):
    """Yield one section. Rates are images/s, divided by the cores that a candidate may use."""
    check()
    limit = timing.Limit(o.limit)
    with tempfile.TemporaryDirectory() as folder:
        shown = photographs.write(folder, o.images)
        source = data.open_source(f"folder:{folder}", image_size=o.size)
        gib = DATA["data.cache_gib"].default
        mesh = device_mesh.make_mesh({"data": 1}, jax.devices()[:1])
        cache = device_cache.DeviceCache(source, "train", mesh, device_cache.DEFAULT_SIZE * o.size, gib, o.threads)
        batches = -(-o.images // o.batch)
        with contextlib.ExitStack() as stack:
            cached = _stream(o, source, cache)
            stack.callback(cached.close)
            runs = {
                FLOOR: (timing.repeated(_floor(o, source)), o.images),
                PIPELINE: (_pipeline(o, source, batches), batches * o.batch / o.threads),
                CACHE: (timing.repeated(_drawing(cached, batches)), batches * o.batch / o.threads),
            }
            candidates = [timing.Candidate(name, run, amount) for name, (run, amount) in runs.items()]
            figures = timing.alternate(candidates, o.rounds, o.seconds, limit)
    per_image = {c.name: [s / c.amount for s in figures[c.name]["seconds"]] for c in candidates if c.name in figures}
    pairs = [(f"images/s a core of the {name} over the floor's", FLOOR, name) for name in (PIPELINE, CACHE)]
    ratios = timing.ratios(per_image, pairs)
    notes = [
        f"{o.images} JPEGs of {shown}, about {photographs.WIDTH} x {photographs.HEIGHT}, random crops of 20% to 100%",
        "the floor decodes the cropped part from memory by tensorflow and resizes it by Pillow, and does nothing else",
        "the device cache decodes once, before; its rate is that of cropping and resizing inside jit, on one device",
    ]
    title = f"input, {o.size} px, batches of {o.batch}, uint8"
    yield section.make("input", title, "images/s a core", candidates, figures, ratios, limit, notes)


def _stream(o, source, cache=None):
    shown = [image.FIELDS[f"data.{name}"].default for name in ("crop_scale", "crop_ratio", "flip")]
    spec = data.ImageSpec(o.size, 0, (0,), True, *shown)
    return data.train_batches(source, spec, split="train", batch_size=o.batch, workers=o.threads, cache=cache)


def _pipeline(o, source, batches):
    """Return the `run` of the pipeline. It opens a new pipeline each time and draws one batch before the clock starts.

    An open pipeline would fill its buffers while other candidates are timed.
    """

    def run(calls):
        stream = _stream(o, source)
        try:
            next(stream)
            return timing.repeated(_drawing(stream, batches))(calls)
        finally:
            stream.close()

    return run


def _drawing(stream, batches):
    def call():
        for _ in range(batches):
            jax.block_until_ready(next(stream)["image"])

    return call


def _floor(o, source):
    """Return a function that decodes the crop of every image and resizes it, in one thread. Files and boxes are prepared."""
    from qbheat_jax.data.cpu_tensorflow import tf

    work = []
    for index in range(source.splits["train"]):
        encoded, _, _ = source.fetch("train", index)
        header = decode.open_header(encoded)
        scale, ratio = (image.FIELDS[f"data.crop_{name}"].default for name in ("scale", "ratio"))
        generator = augment.rng(0, 0, index, "crop")
        work.append((encoded, augment.random_resized_crop_box(generator, header.height, header.width, scale, ratio)))

    def call():
        for encoded, box in work:
            pixels = tf.io.decode_and_crop_jpeg(encoded, box, channels=3, dct_method="INTEGER_ACCURATE").numpy()
            augment.resize(pixels, o.size)

    return call
