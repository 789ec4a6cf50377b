# Spec Decode in a container, on CUDA or on the CPU, as an unprivileged user.
#
#   docker build -t spec-decode .
#   docker run --rm --gpus all -p 7860:7860 -v spec-decode:/cache spec-decode
#
# and without a GPU:
#
#   docker build --build-arg TORCH=cpu -t spec-decode:cpu .
#   docker run --rm -p 7860:7860 -v spec-decode:/cache spec-decode:cpu
#
# PyTorch's Linux wheels contain the CUDA libraries, so the same Python image is used for both; the host needs only the
# NVIDIA driver and container toolkit.
FROM python:3.12.11-slim-bookworm

# cuda: the wheels of the Python Package Index. cpu: PyTorch's own index, about 5 GB less.
ARG TORCH=cuda

ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    SPEC_DECODE_CACHE=/app/model \
    HF_HOME=/cache/huggingface \
    GRADIO_TEMP_DIR=/tmp/gradio

# A Hugging Face Space runs with uid 1000 too.
RUN useradd --uid 1000 --create-home app \
    && install --directory --owner app --group app /app /cache
WORKDIR /app

COPY requirements.txt .
RUN --mount=type=cache,target=/root/.cache/pip \
    if [ "$TORCH" = cpu ]; then \
        pip install "$(grep ^torch requirements.txt)" --index-url https://download.pytorch.org/whl/cpu; \
    fi \
    && pip install --requirement requirements.txt

# The embedded model (0.54 GB) is prepared at build time, so that a container needs no network and is ready in seconds.
# It is outside the volume, so that it is not copied there, and belongs to the user, so that a damaged file can be
# repaired. Models of the Hub go to the volume.
USER 1000
COPY --chown=1000:1000 spec_decode/__init__.py spec_decode/errors.py spec_decode/
COPY --chown=1000:1000 spec_decode/loading/__init__.py spec_decode/loading/embedded.py spec_decode/loading/
RUN PIP_NO_CACHE_DIR=1 python -c "from spec_decode.loading.embedded import prepare; prepare(print)"

COPY --chown=1000:1000 . .

# Compiles the CPU kernels. On another type of processor they are compiled again at the first start.
RUN python -m spec_decode race --device cpu --prompt "Hello" --temperature 0.7 --max-new-tokens 4 > /dev/null

VOLUME /cache
EXPOSE 7860

# The page is up within seconds. Loading the model may take longer; the container is unhealthy only if loading failed.
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:7860/health', timeout=4).close()"]

# PID 1 ignores SIGTERM without a handler; Python handles SIGINT.
STOPSIGNAL SIGINT
CMD ["python", "app.py", "--host", "0.0.0.0", "--port", "7860"]
