"""Lower bounds on a step's time and upper bounds on its speed. They are bounds, not predictions."""


def floors(chip, *, arithmetic, bytes_accessed=None, sent=None):
    """Return the least time of a step for each resource alone.

    Args:
      chip: A `chips.Chip`.
      arithmetic: Floating-point operations of matmuls and convolutions, per device and step.
      bytes_accessed: HBM bytes, per device and step; None if unknown.
      sent: Bytes sent to other devices, per device and step; None if unknown.

    Returns:
      {"arithmetic": seconds, "memory": seconds, "interconnect": seconds}, without the unknown ones.
    """
    given = {
        "arithmetic": (arithmetic, chip.flops),
        "memory": (bytes_accessed, chip.hbm_bandwidth),
        "interconnect": (sent, chip.links),
    }
    return {name: amount * chip.devices / rate for name, (amount, rate) in given.items() if amount is not None}


def upper(floors, images_per_chip):
    """Return upper bounds on a step's speed.

    The largest floor binds: the other resources can at best overlap with it.

    Args:
      floors: Dict of `floors`.
      images_per_chip: Images per chip and step.

    Returns:
      Dict with "binds" (name of the largest floor), "step_seconds_at_least", "images_per_second_per_chip_at_most" and
      "mfu_at_most" (model FLOPs over peak FLOPs in that time).
    """
    binds = max(floors, key=floors.get)
    seconds = floors[binds]
    return {
        "binds": binds,
        "step_seconds_at_least": seconds,
        "images_per_second_per_chip_at_most": images_per_chip / seconds,
        "mfu_at_most": floors["arithmetic"] / seconds,
    }
