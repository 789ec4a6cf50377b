# Spec Decode in a container, on CUDA or on the CPU, as a user without rights.
#
#   docker build -t spec-decode .
#   docker run --rm --gpus all -p 7860:7860 -v spec-decode:/cache spec-decode
#
# and without a GPU:
#
#   docker build --build-arg TORCH=cpu -t spec-decode:cpu .
#   docker run --rm -p 7860:7860 -v spec-decode:/cache spec-decode:cpu
#
# PyTorch's Linux wheels carry CUDA's libraries, so one plain Python image serves both; the host needs only the
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

# uid 1000 is also who a Hugging Face Space runs as
RUN useradd --uid 1000 --create-home app \
    && install --directory --owner app --group app /app /cache
WORKDIR /app

COPY requirements.txt .
RUN --mount=type=cache,target=/root/.cache/pip \
    if [ "$TORCH" = cpu ]; then \
        pip install "$(grep ^torch requirements.txt)" --index-url https://download.pytorch.org/whl/cpu; \
    fi \
    && pip install --requirement requirements.txt

# The embedded model is prepared here and not at the first start: 0.54 GB beside gigabytes of PyTorch, and in return a
# container needs no network and is ready in seconds. It lies outside the volume, so it is not copied into it, and is
# the user's own, so that a damaged file can be mended. Models of the Hub go to the volume.
USER 1000
COPY --chown=1000:1000 spec_decode/__init__.py spec_decode/errors.py spec_decode/embedded.py spec_decode/
RUN PIP_NO_CACHE_DIR=1 python -c "from spec_decode.embedded import prepare; prepare(print)"

COPY --chown=1000:1000 . .

# Compiles the CPU kernels. On another kind of processor they are compiled anew at the first start.
RUN python -m spec_decode race --device cpu --prompt "Hello" --temperature 0.7 --max-new-tokens 4 > /dev/null

VOLUME /cache
EXPOSE 7860

# the page is up within seconds; the model behind it may take longer, which is healthy until it has failed
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:7860/health', timeout=4).close()"]

# a first process ignores SIGTERM unless it handles it; Python handles SIGINT
STOPSIGNAL SIGINT
CMD ["python", "app.py", "--host", "0.0.0.0", "--port", "7860"]
