"""Runs a server: binds, loads, serves, drains."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
from functools import partial
from typing import TYPE_CHECKING

import uvicorn

from eagle_target.errors import ConfigError, EngineStuck
from eagle_target.plugins.registry import load_plugins
from eagle_target.server.app import TargetApp
from eagle_target.server.channels import Channels
from eagle_target.server.engine.server import TargetModelServer
from eagle_target.server.http_limits import limited_connections
from eagle_target.server.middleware import PresenceGate, RequestRecorder, TokenGate, make_tls, open_tokens
from eagle_target.server.shutdown import UnusedWatch
from eagle_target.targets import load_runner

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from eagle_target.config import ServerConfig
    from eagle_target.contract.runner import TargetRunner

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.05
# A trainer's step may take a while; its connections should be there for the next one.
KEEP_ALIVE_SECONDS = 75
# What an engine that does not return leaves to send the answers that say so, and to end in order.
STUCK_SECONDS = 5.0
STUCK_EXIT_SECONDS = 15.0
# How long the engine's thread may take to end; it is a daemon and ends with the process at the latest.
CLOSE_SECONDS = 30.0
STOP_SECONDS = 1.0


class HttpServer:
    """One server on one socket, on the calling thread or one of its own.

    Args:
        config: its settings.
        load: loads the target; None for what the settings name.

    Raises:
        ConfigError: the address cannot be bound, or would stand open to others; a file of tokens or for TLS cannot be
            used. PluginError: a transport cannot be offered.
    """

    def __init__(self, config: ServerConfig, load: Callable[[], TargetRunner] | None = None) -> None:
        self._config = config
        tokens, self._tls = open_tokens(config), make_tls(config)
        self._socket = _bind(config)
        try:
            self._channels = Channels(
                load_plugins(),
                config.transports,
                config.transport_options,
                max_channels=config.max_channels,
                lease=config.channel_lease,
            )
        except BaseException:
            self._socket.close()
            raise
        self.engine = TargetModelServer(
            load or partial(load_runner, config.engine, config.model, config.engine_options, config.aux_layer_ids),
            aux_layer_ids=config.aux_layer_ids,
            max_batch_tokens=config.max_batch_tokens,
            max_queue=config.max_queue,
            max_mappings=config.max_mappings,
            max_outbox_bytes=config.max_outbox_bytes,
            max_client_outbox_bytes=config.max_client_outbox_bytes,
            max_restarts=config.max_restarts if config.on_engine_failure == "restart" else 0,
            forward_timeout=config.forward_timeout,
            client_lease=config.channel_lease,
        )
        self._app = TargetApp(self.engine, self._channels, config)
        self.port: int = self._socket.getsockname()[1]
        settings = uvicorn.Config(
            RequestRecorder(
                TokenGate(PresenceGate(self._app.asgi, self.engine.clients), tokens), self._app.note_record
            ),
            loop="auto",
            http=limited_connections(config, lambda kind: self._app.metrics.count_problem(kind, kind.status)),
            ssl_context_factory=None if self._tls is None else partial(_given, self._tls),
            # Nothing between a client and the server is believed about who the client is.
            proxy_headers=False,
            server_header=False,
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=max(1, round(config.drain_timeout)),
        )
        self._uvicorn = _Uvicorn(settings)
        self._app.metrics.watch_connections(lambda: len(self._uvicorn.server_state.connections))
        self._thread: threading.Thread | None = None
        self._hurried = False
        self._last_resort: threading.Timer | None = None

    @property
    def url(self) -> str:
        """Where clients on this machine reach it."""
        host = "127.0.0.1" if self._config.host in ("0.0.0.0", "::") else self._config.host  # noqa: S104 - compared
        scheme = "http" if self._tls is None else "https"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self.port}"

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT; the first drains, a second one stops.

        Raises:
            AdapterError: the target could not be loaded. EngineDead, EngineStuck: it served, and cannot go on.
        """
        try:
            if self._config.port_file is not None:
                _write_port(self._config.port_file, self.port)
            self.engine.start()
            with asyncio.Runner(loop_factory=self._uvicorn.config.get_loop_factory()) as runner:
                runner.run(self._serve_process())
            if self.engine.ended_by is not None:
                raise self.engine.ended_by(f"cannot serve {self._config.model}: {self.engine.failure}")
        finally:
            self.close()

    def start(self) -> None:
        """Serve on a thread of its own, until `close`."""
        self.engine.start()
        self._thread = threading.Thread(target=self._run_on_thread, name="eagle-target-http", daemon=True)
        self._thread.start()

    def drain(self) -> None:
        """Take no more requests and stop once those under way are answered."""
        self.engine.drain()
        self._uvicorn.draining = True

    def close(self) -> None:
        """Stop at once and release everything. Safe to call twice."""
        self._uvicorn.should_exit = True
        self._uvicorn.force_exit = True
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.engine.close(STOP_SECONDS if self._hurried else CLOSE_SECONDS)
        self._channels.close()
        self._socket.close()
        if self._last_resort is not None:
            self._last_resort.cancel()

    def _run_on_thread(self) -> None:
        with asyncio.Runner(loop_factory=self._uvicorn.config.get_loop_factory()) as runner:
            runner.run(self._serve())

    async def _serve_process(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        watch = loop.create_task(self._watch_engine())
        try:
            await self._serve()
        finally:
            watch.cancel()

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        unused = UnusedWatch(self.engine, self._config, active=lambda: self._app.active, drain=self.drain)
        watches = [loop.create_task(self._finish_drain()), loop.create_task(unused.run())]
        try:
            await self._uvicorn.serve(sockets=[self._socket])
        finally:
            for watch in watches:
                watch.cancel()

    def _on_signal(self) -> None:
        if self._uvicorn.draining:
            logger.warning("second signal: stopping at once")
            self._hurried = self._uvicorn.force_exit = True
            self._uvicorn.should_exit = True
        else:
            logger.info("draining: no new requests, %d under way", self._app.active)
            self.drain()

    async def _watch_engine(self) -> None:
        """Say when the target is ready, and stop when there is no engine to go on with."""
        announced = 0
        while self.engine.ended_by is None:
            await asyncio.sleep(POLL_SECONDS)
            if announced < self.engine.loads and self.engine.state == "ready":
                announced = self.engine.loads
                self._announce()
        if self.engine.ended_by is EngineStuck:
            await self._leave_stuck_engine()
        self._uvicorn.should_exit = True

    async def _leave_stuck_engine(self) -> None:
        """Let the answers that say so out, and wait for nothing that may wait for the engine."""
        # Not even for this thread, should it be held up from here on.
        self._last_resort = threading.Timer(STUCK_EXIT_SECONDS, os._exit, (EngineStuck.exit_status,))
        self._last_resort.daemon = True
        self._last_resort.start()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STUCK_SECONDS):
                while self._app.active:
                    await asyncio.sleep(POLL_SECONDS)
        self._hurried = self._uvicorn.force_exit = True

    async def _finish_drain(self) -> None:
        """Once draining, stop when everything under way is answered, or has had its time."""
        while not self._uvicorn.draining:
            await asyncio.sleep(POLL_SECONDS)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._config.drain_timeout):
                while self._app.active:
                    await asyncio.sleep(POLL_SECONDS)
        if self._app.active:
            logger.warning("%d requests were still under way after %g s", self._app.active, self._config.drain_timeout)
            self._hurried = self._uvicorn.force_exit = True
        self._uvicorn.should_exit = True

    def _announce(self) -> None:
        served = self.engine.served
        logger.info(
            "serving %s (%s, layers %s) with %s %s on %s, transports %s",
            served.info.model,
            served.info.dtype,
            ",".join(map(str, served.aux_layer_ids)),
            served.info.engine,
            served.info.engine_version,
            self.url,
            ",".join(self._channels.offers()),
        )


class _Uvicorn(uvicorn.Server):
    """uvicorn without its signal handlers."""

    draining = False

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the process."""
        yield


def _given(context: ssl.SSLContext, *_: object) -> ssl.SSLContext:
    """A factory for uvicorn, which otherwise reads the files itself."""
    return context


def _bind(config: ServerConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Accepted connections inherit these: the kernel drops a peer that is dead or stopped reading, and with it
        # whatever the connection still buffers, which no closing from user space does.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(config.send_timeout * 1000))
        listener.bind((config.host, config.port))
        listener.listen(256)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {config.host}:{config.port}: {error.strerror or error}") from error
    return listener


def _write_port(path: Path, port: int) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(f"{port}\n", encoding="ascii")
        draft.replace(path)
    except OSError as error:
        raise ConfigError(f"cannot write port_file {path}: {error.strerror or error}") from error
