# qbheat on NVIDIA GPUs. jax's wheels contain CUDA; the host only provides the driver. docs/docker.md has the commands.
#
#   docker build --tag qbheat:cuda --file launch/docker/cuda.Dockerfile .
#   docker run --rm --init --gpus all qbheat:cuda doctor
FROM python:3.12.12-slim-bookworm

# Extras of setup.py; change them with, for example, --build-arg EXTRAS=cuda12.
ARG EXTRAS=cuda13,photos,report
# Devices and driver libraries that NVIDIA's container runtime gives to the container.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

# Install the dependencies first: this layer is nearly the whole image, and a change of the code does not rebuild it.
WORKDIR /qbheat_jax
COPY setup.py pyproject.toml ./
COPY qbheat_jax/__init__.py qbheat_jax/
RUN touch README.md && pip install --no-cache-dir --editable "./[$EXTRAS]"

# Install the package as editable, so that a checkout mounted over this folder replaces it.
COPY . .
RUN pip install --no-cache-dir --no-deps --editable . \
    && python -m compileall -q qbheat_jax \
    && useradd --create-home --uid 1000 qbheat \
    && install --directory --owner=qbheat runs

USER 1000
ENTRYPOINT ["qbheat"]
CMD ["--help"]
