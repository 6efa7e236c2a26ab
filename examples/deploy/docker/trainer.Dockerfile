# docker build -f examples/deploy/docker/trainer.Dockerfile -t eagle-target:trainer .
ARG BASE=pytorch/pytorch:2.9.1-cuda12.8-cudnn9-runtime
FROM ${BASE}

USER 0

# The image's own Python: its torch is kept. A trainer needs no engine.
ENV PIP_BREAK_SYSTEM_PACKAGES=1
WORKDIR /opt/eagle-target
COPY pyproject.toml README.md LICENSE ./
COPY eagle_target eagle_target
COPY transports transports
RUN python3 -m pip install --no-cache-dir .
COPY examples/torchrun_client.py examples/torchrun_client.py

# The servers' user: transport `shm` is between processes of one user.
RUN useradd --uid 10001 --user-group --create-home eagle \
    && install --directory --owner eagle --group eagle /home/eagle/.cache
USER 10001:10001
WORKDIR /home/eagle

ENTRYPOINT ["torchrun", "--standalone"]
CMD ["--nproc-per-node", "1", "/opt/eagle-target/examples/torchrun_client.py", "http://127.0.0.1:8001"]
