"""Work around Pillow's PNG limits: large metadata, and transparent colours of other bit depths."""

import struct

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Text and colour profiles, which no pixel depends on. Pillow refuses the whole file if they are large.
_METADATA = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
# Uncompressed metadata up to this many bytes is kept, because an XMP packet may hold the orientation.
_KEPT = 1 << 18


def without_metadata(data):
    """Return the bytes of a PNG without large or compressed text and profiles; other data is returned unchanged."""
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
    """Return whether a text or profile chunk is compressed; in iTXt, the byte after the keyword tells."""
    return kind in (b"zTXt", b"iCCP") or (kind == b"iTXt" and body.partition(b"\0")[2][:1] == b"\1")


def scale_transparency(image, data):
    """Scale the transparent colour of a PNG as Pillow scales its pixels; Pillow itself leaves it unscaled.

    Of 16-bit channels Pillow keeps the upper 8 bits, so every colour that shares them becomes transparent.

    Args:
      image: PIL image whose header has been read; its `info` is modified.
      data: bytes of the file.
    """
    key, depth = image.info.get("transparency"), data[24]
    if isinstance(key, int) and image.mode == "L" and depth in (2, 4):
        image.info["transparency"] = key * 255 // (2**depth - 1)
    elif isinstance(key, tuple) and depth == 16:
        image.info["transparency"] = tuple(value >> 8 for value in key)
