# `rabbit serve` in a container, for a CPU or for NVIDIA GPUs:
#   docker build --target cpu --build-arg TORCH_INDEX=ADDRESS -t rabbit:cpu .     ADDRESS: PyTorch's index of CPU builds; without
#   docker build --target cuda -t rabbit:cuda .                                   it, pip's default build comes, with CUDA
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS source
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/rabbit/bin:$PATH
RUN python -m venv /opt/rabbit
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY rabbit_engine rabbit_engine

FROM source AS install-cpu
ARG TORCH_INDEX=""
RUN if [ -n "$TORCH_INDEX" ]; then pip install --index-url "$TORCH_INDEX" "torch>=2.11"; fi \
    && pip install ".[cpu,gguf,sentencepiece,serve]"

FROM source AS install-cuda
RUN pip install ".[bnb,gguf,sentencepiece,serve]"

# The models, what is split of them, and what is kept about them are in /models: mount a volume there. /run/keys holds the keys of clients.
FROM python:${PYTHON}-slim AS base
RUN useradd --uid 1000 --create-home rabbit && install -d -o rabbit -g rabbit /models
ENV PATH=/opt/rabbit/bin:$PATH HF_HOME=/models/huggingface PYTHONUNBUFFERED=1
USER 1000
WORKDIR /models
VOLUME /models
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=10s --start-period=10m --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=8)"]
ENTRYPOINT ["rabbit", "serve", "--host", "0.0.0.0", "--api-key-file", "/run/keys"]
CMD ["--help"]

FROM base AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=install-cuda /opt/rabbit /opt/rabbit

FROM base AS cpu
COPY --from=install-cpu /opt/rabbit /opt/rabbit
