"""Images for TensorBoard while a run trains: reconstructions, feature maps, the spectra of A and B."""

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from qbheat_jax import device_mesh
from qbheat_jax.analysis import pictures
from qbheat_jax.errors import UserError
from qbheat_jax.methods.qbheat import QBHeat
from qbheat_jax.ops import heat
from qbheat_jax.report import sample

# Images in each picture.
SHOWN = 6


class ImageSummaries:
    """Images of a run's state, drawn from the same images as its report.

    Call it in every process with variables on the run's mesh. It returns {name: uint8 [H, W, 3]}:

    * `features`: the image, the principal components of its map as colours, likeness to the framed cell; for QB-Heat also the
      map extrapolated from a quarter, in the same colours, and its error.
    * `reconstructions` at the placements trained on, and `spectra` of A and B where it has them, for QB-Heat alone.

    Raises:
      UserError: no image can be read.
    """

    def __init__(self, config, objective):
        self._objective, self._images = objective, sample.draw(config).images[:SHOWN]
        if not len(self._images):
            raise UserError(f"config field images_every: no image of data.source={config.data.source!r} can be read")
        # Parameters that are made for crops are too small for whole images.
        self._whole = (objective.encoder.image_size or config.image_size) >= config.image_size
        self._continues = isinstance(objective, QBHeat)
        # Replicated: the arrays are small.
        everywhere = NamedSharding(device_mesh.make_mesh(config.mesh), PartitionSpec())
        self._compute = jax.jit(self._arrays, out_shardings=everywhere)

    def __call__(self, variables):
        found, made = jax.device_get(self._compute(variables)), {}
        if self._whole:
            made["features"] = pictures.tiled(_features(self._images, found["map"], found.get("continued")))
        if self._continues:
            framed = map(pictures.visible_framed, found["made"], self._objective.decoder.placements)
            made["reconstructions"] = pictures.tiled(list(zip(self._images, *framed)))
            cells = found["continued"].shape[1] // 2
            spectra = _spectra(found["heat"], self._objective.decoder.heat)
            if spectra:
                made["spectra"] = pictures.spectra(spectra, cells)
        return {name: np.asarray(picture) for name, picture in made.items()}

    def _arrays(self, variables):
        """Return the arrays of the images: `map` [N, h, w, C]; for QB-Heat also `made` [P, N, H, W, 3], `heat` and `continued`.

        `continued` has the shape of `map`; the placements take turns.
        """
        objective, images, found = self._objective, self._images, {}
        if self._whole:
            encoder = {name: tree["encoder"] for name, tree in variables.items() if "encoder" in tree}
            whole, _ = objective.encoder.apply(encoder, objective.pixels.normalise(images))
            found["map"] = whole.astype(np.float32)
        if self._continues:
            # All placements of all images at once, to compile the encoder once.
            count, placements = len(images), np.array(objective.decoder.placements, np.int32)
            given = np.tile(images, (len(placements), 1, 1, 1)), np.repeat(placements, count)
            made, grids = objective.reconstruct(variables, *given), objective.continued(variables, *given)
            found["made"] = made.reshape(-1, *images.shape)
            turns = np.arange(count)
            found["continued"] = grids[count * (turns % len(placements)) + turns]
            found["heat"] = variables["params"]["decoder"]["heat"]
        return found


def _features(images, whole, continued):
    """Return rows of tiles: each image, its map [h, w, C] as colours and likeness, and the extrapolated map, if any."""
    colours, mean = pictures.Colours.of(whole), whole.mean((0, 1, 2))
    alike = [pictures.likeness_colours(*pictures.likeness(z - mean)) for z in whole]
    columns = [images, colours(whole), alike]
    if continued is not None:
        errors = pictures.error(continued - mean, whole - mean)
        columns += [colours(continued), pictures.error_colours(errors)]
    return list(zip(*columns))


def _spectra(params, choice):
    """{direction: eigenvalues complex[C]} of the learnt operators."""
    return {name: np.linalg.eigvals(np.asarray(heat.generator(params, choice, name))) for name in choice.names}
