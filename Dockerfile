# vlmprune in a container. EXTRAS are extras of pyproject.toml:
#   docker build --tag vlmprune .                                                   CPU, with the data of the demo
#   docker build --tag vlmprune --build-arg EXTRAS=cuda,demo .                      NVIDIA GPUs (run with --gpus all)
#   docker build --tag vlmprune --build-arg EXTRAS=tpu .                            Cloud TPU (run with --privileged)
#   docker run --volume $PWD/runs:/vlmprune-jax/runs vlmprune demo --workdir=runs/demo
ARG PYTHON=3.12
FROM python:${PYTHON}-slim
ARG EXTRAS=demo
COPY pyproject.toml README.md LICENSE /vlmprune-jax/
COPY vlmprune_jax /vlmprune-jax/vlmprune_jax
COPY configs /vlmprune-jax/configs
WORKDIR /vlmprune-jax
RUN pip install --no-cache-dir --editable ".[${EXTRAS}]"
ENTRYPOINT ["vlmprune"]
