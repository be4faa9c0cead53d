"""A source of clips as files in HARDVS's layout."""

import numpy as np
from PIL import Image

from qbheat_jax.data.clip import MODALITIES
from qbheat_jax.data.sources.har import ENDINGS

DIR = "{split}/{label}/clip{index:03}"


def write_har(folder, source, *, stride=5, offset=0, inside=False, splits=("train", "val", "test")):
    """Write the splits of a source of clips below `folder`, and return the paths [(RGB folder, event folder), ...] by split.

    inside: Each clip's two folders lie in a folder of the clip's own instead of beside each other.
    """
    written = {split: [] for split in splits}
    for split in splits:
        lines = []
        for index in range(source.splits[split]):
            clip = source.clip(split, index)
            name = DIR.format(split=split, label=clip.label, index=index)
            start = folder / name / name.rpartition("/")[2] if inside else folder / name
            pair = [start.with_name(start.name + ending) for ending in ENDINGS]
            for one in pair:
                one.mkdir(parents=True)
            for number, frames in enumerate(clip.read(range(clip.count))):
                for one, frame in zip(pair, frames):
                    rgb = np.broadcast_to(frame, (*frame.shape[:2], 3))
                    Image.fromarray(rgb).save(one / f"{stride * number + offset:08}.png", compress_level=1)
            lines.append(f"{name} {clip.count} {clip.label}\n")
            written[split].append(pair)
        (folder / f"{split}_label.txt").write_text("".join(lines))
    assert len(ENDINGS) == len(MODALITIES)
    return written
