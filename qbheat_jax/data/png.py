"""What Pillow leaves to be done for a PNG: metadata beyond its limits, and transparent colours of every bit depth."""

import struct

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Texts and colour profiles, which no pixel depends on. Pillow refuses the whole file where they are large.
_METADATA = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
# So many bytes of them stay where they are not compressed: an XMP packet may say how the image is turned.
_KEPT = 1 << 18


def without_metadata(data):
    """Return the bytes of a PNG without large or compressed texts and profiles; other bytes as they are."""
    if not data.startswith(_SIGNATURE):
        return data
    view, kept, room, begin = memoryview(data), [_SIGNATURE], _KEPT, len(_SIGNATURE)
    while begin + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, begin)
        end = begin + 12 + length
        if kind not in _METADATA:
            kept.append(view[begin:end])
        elif length <= room and not _compressed(kind, bytes(view[begin + 8 : end - 4])):
            kept.append(view[begin:end])
            room -= length
        begin = end
    return b"".join(kept) if sum(map(len, kept)) < len(data) else data


def _compressed(kind, body):
    """Return whether a text or profile is compressed; an iTXt chunk says so in the byte after its keyword."""
    return kind in (b"zTXt", b"iCCP") or (kind == b"iTXt" and body.partition(b"\0")[2][:1] == b"\1")


def scale_transparency(image, data):
    """Scale the transparent colour of a PNG as Pillow scales its pixels; Pillow leaves it as the file has it.

    Of 16 bits a channel Pillow keeps the upper 8, so every colour with these is taken for the transparent one.

    Args:
      image: PIL image whose header has been read; its `info` is changed.
      data: the file's bytes.
    """
    key, depth = image.info.get("transparency"), data[24]
    if isinstance(key, int) and image.mode == "L" and depth in (2, 4):
        image.info["transparency"] = key * 255 // (2**depth - 1)
    elif isinstance(key, tuple) and depth == 16:
        image.info["transparency"] = tuple(value >> 8 for value in key)
