"""The world's PyTorch weights, read exactly or not at all, and ours given back by the same names."""


def port(source, arch, workdir, **options):
    """A file of weights -> a workdir that every command takes; see `importer.port`."""
    from qbheat_jax.port import importer  # jax is only loaded once it is needed

    return importer.port(source, arch, workdir, **options)


def export(directory, target, **options):
    """A workdir -> one file of weights, or of a program, for others; see `exporter.export`."""
    from qbheat_jax.port import exporter

    return exporter.export(directory, target, **options)
