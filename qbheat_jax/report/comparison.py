def write(result, workdir):
    pass
