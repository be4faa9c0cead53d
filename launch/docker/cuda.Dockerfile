# qbheat on NVIDIA GPUs: CUDA comes with jax's wheels, only the driver is the host's. docs/docker.md has the commands.
#
#   docker build --tag qbheat:cuda --file launch/docker/cuda.Dockerfile .
#   docker run --rm --init --gpus all qbheat:cuda doctor
FROM python:3.12.12-slim-bookworm

# Other extras of setup.py: --build-arg EXTRAS=cuda12
ARG EXTRAS=cuda13,photos,report
# What NVIDIA's container runtime shows to the container.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

# Dependencies first: this layer, which is nearly all of the image, stays as it is when only the code changes.
WORKDIR /qbheat_jax
COPY setup.py pyproject.toml ./
COPY qbheat_jax/__init__.py qbheat_jax/
RUN touch README.md && pip install --no-cache-dir --editable "./[$EXTRAS]"

# Editable: a checkout that is mounted over this folder is then what runs.
COPY . .
RUN pip install --no-cache-dir --no-deps --editable . \
    && python -m compileall -q qbheat_jax \
    && useradd --create-home --uid 1000 qbheat \
    && install --directory --owner=qbheat runs

USER 1000
ENTRYPOINT ["qbheat"]
CMD ["--help"]
