"""Base class of the methods: what each one declares, and the defaults of what it may leave out."""

import dataclasses

from qbheat_jax.data.specs.clips import ClipsSpec
from qbheat_jax.data.specs.image import ImageSpec
from qbheat_jax.models import registry

# Tasks: which table of config fields a method belongs to, and so which command trains it. DETECT is that of all methods that
# learn from annotations of places in an image, by default on a frozen encoder.
PRETRAIN, FINETUNE, DETECT, PORTED = "pretrain", "finetune", "detect", "ported"


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Length of a run, for schedules of momentum or temperature. None where it is not known.

    Args:
      total_steps: Steps of the run.
      steps_per_epoch: Steps of one pass over the training split; a fraction where the batch does not divide it.
    """

    total_steps: int | None = None
    steps_per_epoch: float | None = None


def crop_spec(config, placements=(0,)):
    """Return the data spec of one random crop of every image, or of every clip where the encoder takes clips."""
    spec = ClipsSpec if registry.takes_clips(config.encoder.name) else ImageSpec
    return spec.of(config, placements)


class Method:
    """A training objective: its variables and its loss.

    A subclass is a frozen dataclass with `encoder` and `pixels` (`images.Pixels`) among its fields. It defines its config
    fields and their checks, how it is built, its batches, its loss and its text on pages. CONTRACT:

    `init(rng, batch) -> {"params": {part: tree}, "batch_stats": state}`. `params` is trained and has a part "encoder". The
      state is everything else that a step changes: running statistics under the name of each part, and the method's own
      entries, such as a teacher. (Checkpoints store it under the key "batch_stats".)
    `loss(params, state, batch, rng, train=True) -> (float32 loss, (state, {name: float32}))`. Outside training `rng` is None
      and the state is returned unchanged. `batch` has the entries of `batch_spec`; `mask` bool [B] is False for padding and
      unreadable images.
    """

    # Name in configs (`objective`), and a few words on it for the field's doc.
    NAME, NOTE = "", ""
    TASK = PRETRAIN
    # Name on pages, and one paragraph.
    TITLE, STORY = "", ""
    # Own config fields: {dotted key: config.Field}. Two methods share a field by declaring the same Field.
    FIELDS = {}
    # Entries of the state that are copies of parameters, such as a teacher. They are sharded as the parameters are.
    sharded_like_params = ()
    # Name of the file in `eval/` whose metric measures it; of a method of DETECT.
    METRIC = ""
    # Whether it can train an encoder that takes clips.
    takes_clips = False
    # Whether it is trained on labels and has a `head` and `logits`.
    classifies = False

    @classmethod
    def check(cls, values):
        """Raise UserError for {dotted key: value} that do not go together. Nothing has been built yet."""

    @classmethod
    def build(cls, config, encoder, schedule):
        """Return the method of a checked config.

        Args:
          config: ConfigDict with the method's fields.
          encoder: Linen module.
          schedule: Schedule of the run.

        Raises UserError where the fields and the encoder do not go together.
        """
        raise NotImplementedError

    @classmethod
    def batch_spec(cls, config):
        """Return the data spec of the training batches. The default: one random crop of every image or clip."""
        return crop_spec(config)

    def init(self, rng, batch):
        """Return the variables of a new run, see CONTRACT."""
        raise NotImplementedError

    def loss(self, params, state, batch, rng, train=True):
        """Return (loss, (state, metrics)), see CONTRACT."""
        raise NotImplementedError

    def init_copies(self, variables):
        """Return the variables that a run starts from, with the state's copies made of the given parameters.

        variables: {"params": {part: tree}, "batch_stats": {part: tree}} of the parts that start from given weights.
        """
        return variables
