# Layerscope on a CPU. BASE may be any Debian 12 or newer image: it is only asked for Python 3.11 and a compiler.
ARG BASE=debian:bookworm-slim
FROM ${BASE}

RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 python3-venv python3-dev build-essential cmake curl ca-certificates \
 && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/layerscope
COPY requirements.txt .
# GGML_NATIVE=OFF: the image may be built on one machine and run on another.
# PIP_OPTIONS: extra options for pip, for example --extra-index-url with PyTorch's CPU index, which saves gigabytes of CUDA libraries.
ARG PIP_OPTIONS=""
RUN python3 -m venv .venv \
 && CMAKE_ARGS="-DGGML_NATIVE=OFF" .venv/bin/pip install --no-cache-dir ${PIP_OPTIONS} --requirement requirements.txt
COPY . .

RUN useradd --create-home --uid 1000 layerscope \
 && mkdir -p /data /models && chown layerscope /data /models
USER layerscope
ENV LAYERSCOPE_HOST=0.0.0.0 \
    LAYERSCOPE_ALLOWED_HOSTS='["localhost","127.0.0.1"]' \
    LAYERSCOPE_DATA_DIR=/data \
    LAYERSCOPE_MODELS_DIRS='["/opt/layerscope/models","/models"]' \
    PYTHONUNBUFFERED=1
VOLUME ["/data", "/models"]
EXPOSE 8050
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s CMD curl --fail --silent http://127.0.0.1:8050/healthz || exit 1
CMD [".venv/bin/python", "app.py"]
