"""Import PyTorch weights by exact name and shape, and export ours by the same names."""


def port(source, arch, workdir, **options):
    """Make a workdir from a file of weights; see `importer.port`."""
    from qbheat_jax.port import importer  # loads jax

    return importer.port(source, arch, workdir, **options)


def export(directory, target, **options):
    """Write a workdir's model as one file; see `exporter.export`."""
    from qbheat_jax.port import exporter

    return exporter.export(directory, target, **options)
