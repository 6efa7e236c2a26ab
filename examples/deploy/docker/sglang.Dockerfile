# docker build -f examples/deploy/docker/sglang.Dockerfile -t eagle-target:sglang .
ARG BASE=lmsysorg/sglang:v0.5.23
FROM ${BASE}

USER 0

# The image's own Python: its SGLang and torch are kept.
ENV PIP_BREAK_SYSTEM_PACKAGES=1
WORKDIR /opt/eagle-target
COPY pyproject.toml README.md LICENSE ./
COPY eagle_target eagle_target
COPY transports transports
COPY adapters/sglang adapters/sglang
RUN python3 -m pip install --no-cache-dir . ./adapters/sglang \
    && eagle-target plugins --options sglang

RUN useradd --uid 10001 --user-group --create-home eagle \
    && install --directory --owner eagle --group eagle /home/eagle/.cache
USER 10001:10001
WORKDIR /home/eagle

EXPOSE 8001
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s --retries=3 \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8001/health', timeout=5)"]
# It does not start without a token in that file.
ENTRYPOINT ["eagle-target", "serve", "--engine", "sglang", "--host", "0.0.0.0", \
            "--token-file", "/run/secrets/eagle-target-token"]
