# qbheat on TPU VMs and GKE's TPU slices. The extra tpu installs libtpu. docs/docker.md has the commands.
#
#   docker build --tag qbheat:tpu --file launch/docker/tpu.Dockerfile .
#   docker run --rm --init --privileged --net=host qbheat:tpu doctor
FROM python:3.12.12-slim-bookworm

# Extras of setup.py; change them with, for example, --build-arg EXTRAS=tpu,photos,report.
ARG EXTRAS=tpu

# Install the dependencies first: this layer is nearly the whole image, and a change of the code does not rebuild it.
WORKDIR /qbheat_jax
COPY setup.py pyproject.toml ./
COPY qbheat_jax/__init__.py qbheat_jax/
RUN touch README.md && pip install --no-cache-dir --editable "./[$EXTRAS]"

# Install the package as editable, so that a checkout mounted over this folder replaces it.
COPY . .
RUN pip install --no-cache-dir --no-deps --editable . \
    && python -m compileall -q qbheat_jax

# There is no USER line, because root owns a TPU's device files.
ENTRYPOINT ["qbheat"]
CMD ["--help"]
