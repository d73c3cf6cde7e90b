# The service and the training in one image: `docker run -p 8000:8000 IMAGE` serves, `docker run IMAGE train ...` trains.
#
# Runs as uid 10001 and writes only to
#   /app/models  a checkpoint trained beside the service, with its run (`docker exec CONTAINER robust train --out models/...`)
#   /data        the user's data and checkpoints
#   /tmp         caches, and journals of evaluations in PostgreSQL
# so `--read-only --tmpfs /tmp` is enough to serve; add `-v NAME:/app/models` to train into a serving container.
ARG BASE_IMAGE=python:3.12-slim
FROM ${BASE_IMAGE}

LABEL org.opencontainers.image.title="robust" \
      org.opencontainers.image.description="A robust image classifier you can train, attack, measure and serve" \
      org.opencontainers.image.licenses="MIT"

ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    HOME=/tmp

RUN groupadd --gid 10001 robust \
    && useradd --uid 10001 --gid 10001 --home-dir /tmp --no-create-home --shell /usr/sbin/nologin robust \
    && install -d -o robust -g robust /app /app/models /data \
    && python3 -m venv /opt/venv

# The dependencies have a layer of their own, so a change of the source does not fetch torch again.
# TORCH_INDEX takes torch and torchvision from PyTorch's own index instead, for example its CPU-only wheels from
# https://download.pytorch.org/whl/cpu, for an image several times smaller.
ARG TORCH_INDEX=""
WORKDIR /build
COPY pyproject.toml constraints.txt ./
RUN if [ -n "$TORCH_INDEX" ]; then \
        grep -E '^torch(vision)?==' constraints.txt > torch.txt \
        && pip install --no-deps --index-url "$TORCH_INDEX" -r torch.txt; \
    fi \
    && python3 -c "import tomllib; \
project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
extras = project['optional-dependencies']; \
print(*project['dependencies'], *extras['data'], *extras['demo'], *extras['onnx'], *extras['otel'], *extras['postgres'], *extras['report'], *extras['runtime'], 'setuptools', sep='\n')" > requirements.txt \
    && pip install -c constraints.txt -r requirements.txt

COPY LICENSE README.md robust_cli.py ./
COPY app app
COPY robust robust
COPY training training
RUN pip install --no-deps --no-build-isolation . && rm -rf /build/*

WORKDIR /app
COPY --chown=10001:10001 models models
COPY examples examples

USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
# Checks the service on its default port; run a container that trains with --no-healthcheck.
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python3", "-c", "import http.client, sys; c = http.client.HTTPConnection('127.0.0.1', 8000, timeout=4); c.request('GET', '/readyz'); sys.exit(c.getresponse().status != 200)"]
ENTRYPOINT ["robust"]
CMD ["serve", "--host", "0.0.0.0"]
