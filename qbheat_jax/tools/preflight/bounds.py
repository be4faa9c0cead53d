"""What a step must take at least, and what follows at most: floors of time and upper bounds, not predictions."""


def floors(chip, *, arithmetic, bytes_accessed=None, sent=None):
    """{"arithmetic", "memory", "interconnect": seconds}, each as if alone; what is not known is left out.

    Of one device and step: `arithmetic` operations of products, `bytes_accessed` in HBM, bytes `sent` to other devices.
    """
    given = {
        "arithmetic": (arithmetic, chip.flops),
        "memory": (bytes_accessed, chip.hbm_bandwidth),
        "interconnect": (sent, chip.links),
    }
    return {name: amount * chip.devices / rate for name, (amount, rate) in given.items() if amount is not None}


def upper(floors, images_per_chip):
    """What no step can exceed: the largest floor binds, and the others are hidden behind it.

    `images_per_chip`: of one step. MFU: model FLOPs over what the chips could do in the time.
    """
    binds = max(floors, key=floors.get)
    seconds = floors[binds]
    return {
        "binds": binds,
        "step_seconds_at_least": seconds,
        "images_per_second_per_chip_at_most": images_per_chip / seconds,
        "mfu_at_most": floors["arithmetic"] / seconds,
    }
