# docker build -f examples/deploy/docker/vllm.Dockerfile -t eagle-target:vllm .
ARG BASE=vllm/vllm-openai:v0.32.0
FROM ${BASE}

USER 0

# The image's own Python: its vLLM and torch are kept.
ENV PIP_BREAK_SYSTEM_PACKAGES=1
WORKDIR /opt/eagle-target
COPY pyproject.toml README.md LICENSE ./
COPY eagle_target eagle_target
COPY transports transports
COPY adapters/vllm adapters/vllm
RUN python3 -m pip install --no-cache-dir . ./adapters/vllm \
    && eagle-target plugins --options vllm

RUN useradd --uid 10001 --user-group --create-home eagle \
    && install --directory --owner eagle --group eagle /home/eagle/.cache
USER 10001:10001
WORKDIR /home/eagle

EXPOSE 8001
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s --retries=3 \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8001/health', timeout=5)"]
# It does not start without a token in that file.
ENTRYPOINT ["eagle-target", "serve", "--engine", "vllm", "--host", "0.0.0.0", \
            "--token-file", "/run/secrets/eagle-target-token"]
