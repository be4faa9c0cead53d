# qbheat on TPU VMs and GKE's TPU slices: libtpu comes with jax's wheels. docs/docker.md has the commands.
#
#   docker build --tag qbheat:tpu --file launch/docker/tpu.Dockerfile .
#   docker run --rm --init --privileged --net=host qbheat:tpu doctor
FROM python:3.12.12-slim-bookworm

# Other extras of setup.py: --build-arg EXTRAS=tpu,photos,report
ARG EXTRAS=tpu

# Dependencies first: this layer, which is nearly all of the image, stays as it is when only the code changes.
WORKDIR /qbheat_jax
COPY setup.py pyproject.toml ./
COPY qbheat_jax/__init__.py qbheat_jax/
RUN touch README.md && pip install --no-cache-dir --editable "./[$EXTRAS]"

# Editable: a checkout that is mounted over this folder is then what runs.
COPY . .
RUN pip install --no-cache-dir --no-deps --editable . \
    && python -m compileall -q qbheat_jax

# No USER: a TPU's device files belong to root.
ENTRYPOINT ["qbheat"]
CMD ["--help"]
