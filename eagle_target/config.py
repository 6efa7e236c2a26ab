"""Settings of a server and of a client: YAML file, then EAGLE_TARGET_* environment, then command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator

from eagle_target.errors import ConfigError
from eagle_target.plugins.options import build_model, is_secret, nearest_name, parse_value

if TYPE_CHECKING:
    from collections.abc import Mapping

ENVIRONMENT_PREFIX = "EAGLE_TARGET_"
NESTING = "__"
Config = TypeVar("Config", bound=BaseModel)


class ServerConfig(BaseModel):
    """Settings of `eagle-target serve`."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, coerce_numbers_to_str=True, allow_inf_nan=False, protected_namespaces=()
    )

    engine: str = Field(default="hf", description="Adapter that runs the target; see `eagle-target plugins`.")
    model: str = Field(description="Path or hub id of the target.")
    aux_layer_ids: tuple[int, int, int] | None = Field(
        default=None,
        description="Three decoder layers to capture, `i` being the output of layer i; default the EAGLE-3 recipe.",
    )
    engine_options: dict[str, Any] = Field(
        default_factory=dict, description="Options of the adapter; see `eagle-target plugins --options NAME`."
    )
    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=8001, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    port_file: Path | None = Field(default=None, description="File that gets the port once it is bound.")
    token_file: Path | None = Field(
        default=None, description="File with the tokens that clients may send, one a line; read again when it changes."
    )
    token: SecretStr | None = Field(
        default=None, description="One more token; best given as EAGLE_TARGET_TOKEN, so there is no flag."
    )
    tls_cert: Path | None = Field(default=None, description="PEM file with the server's certificates, for https.")
    tls_key: Path | None = Field(default=None, description="PEM file with the key of the certificate.")
    tls_client_ca: Path | None = Field(
        default=None, description="PEM file with the authorities whose clients are let in, and no others."
    )
    insecure: bool = Field(
        default=False, description="Listen on an address others reach, without a token or clients' certificates."
    )
    transports: tuple[str, ...] = Field(
        default=("auto",), description="Transports to offer; `auto` is every one usable here."
    )
    transport_options: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="Options of transports, by transport name."
    )
    max_batch_tokens: int = Field(
        default=8192, ge=1, description="Tokens of waiting requests that are joined into one forward."
    )
    max_queue: int = Field(default=64, ge=1, description="Requests that may wait; one more is answered 503.")
    max_outbox_bytes: int = Field(
        default=8 << 30, ge=1, description="Bytes of answers that are being made or not sent yet, of all clients."
    )
    max_client_outbox_bytes: int = Field(
        default=2 << 30, ge=1, description="Bytes of such answers of one client; its further requests wait."
    )
    max_request_tokens: int = Field(default=131072, ge=1, description="Tokens one request may have.")
    max_sequence_tokens: int = Field(default=131072, ge=1, description="Tokens one sequence of a request may have.")
    max_sequences: int = Field(default=16384, ge=1, description="Sequences one request may have.")
    max_body_bytes: int = Field(default=64 << 20, ge=1024, description="Bytes a request's body may have.")
    max_headers: int = Field(default=64, ge=16, description="Headers a request may have.")
    max_header_bytes: int = Field(
        default=32768, ge=1024, description="Bytes of a request's first line and headers together."
    )
    max_mappings: int = Field(default=32, ge=1, description="Vocabulary mappings kept; the least used goes first.")
    max_mapping_bytes: int = Field(default=16 << 20, ge=1024, description="Bytes a vocabulary mapping may have.")
    max_connections: int = Field(default=1024, ge=1, description="Connections at a time; one more is answered 503.")
    max_channels: int = Field(default=256, ge=1, description="Open channels of all transports.")
    channel_lease: float = Field(
        default=30.0, gt=0, description="Seconds of silence after which a client is gone, and its channels are closed."
    )
    on_engine_failure: Literal["restart", "exit"] = Field(
        default="restart", description="What follows when an engine that has served dies; see docs/life.md."
    )
    max_restarts: int = Field(
        default=5, ge=1, description="Restarts of the engine within an hour; then the process exits."
    )
    forward_timeout: float = Field(
        default=600.0,
        ge=0,
        description="Seconds a forward, or another call of the engine, may take until the process exits; 0 for any "
        "number.",
    )
    exit_when_idle: float | None = Field(
        default=None, gt=0, description="Seconds without a client and without a request after which the server drains."
    )
    exit_on_disconnect: bool = Field(
        default=False, description="Drain when the only client is gone; off once a second one is connected."
    )
    headers_timeout: float = Field(default=30.0, gt=0, description="Seconds a client may take to send its headers.")
    body_timeout: float = Field(default=30.0, gt=0, description="Seconds a client may take to send a body.")
    send_timeout: float = Field(default=60.0, gt=0, description="Seconds a client may stop reading an answer.")
    drain_timeout: float = Field(default=60.0, gt=0, description="Seconds SIGTERM waits for requests under way.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="Least level logged.")
    log_format: Literal["text", "json"] = Field(
        default="text", description="Form of the log on stderr: a line of text for each event, or a JSON object."
    )

    @field_validator("transports", mode="before")
    @classmethod
    def _split_names(cls, value: Any) -> Any:
        return tuple(name.strip() for name in value.split(",")) if isinstance(value, str) else value

    @field_validator("aux_layer_ids", mode="before")
    @classmethod
    def _split_layers(cls, value: Any) -> Any:
        return tuple(int(part) for part in value.split(",")) if isinstance(value, str) else value


class ClientConfig(BaseModel):
    """Settings of a trainer's side: remote servers, or a target in its own process."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, coerce_numbers_to_str=True, allow_inf_nan=False, protected_namespaces=()
    )

    urls: tuple[str, ...] = Field(default=(), description="Servers to use; empty for a target in this process.")
    engine: str = Field(default="hf", description="Adapter for a target in this process.")
    model: str | None = Field(default=None, description="Path or hub id of a target in this process.")
    aux_layer_ids: tuple[int, int, int] | None = Field(
        default=None, description="Layers to capture, for a target in this process."
    )
    engine_options: dict[str, Any] = Field(default_factory=dict, description="Options of the adapter.")
    device: str = Field(
        default="cpu", description="Where batches go; `cuda` is the current device of the thread that opens the target."
    )
    token_file: Path | None = Field(
        default=None, description="File with the token to send, in its first line; read again when it changes."
    )
    token: SecretStr | None = Field(default=None, description="The token to send; best given as EAGLE_TARGET_TOKEN.")
    ca_file: Path | None = Field(
        default=None, description="PEM file with the authorities servers are checked against; default the system's."
    )
    client_cert: Path | None = Field(default=None, description="PEM file with this client's certificate.")
    client_key: Path | None = Field(default=None, description="PEM file with the key of that certificate.")
    checksum: bool = Field(default=True, description="Have each answer's body come with a checksum, and check it.")
    transport: str = Field(
        default="auto", description="`auto` for the best both ends have, a name, or names in order of preference."
    )
    transport_options: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="Options of transports, by transport name."
    )
    encoding: Literal["auto", "probs", "hidden", "logits"] = Field(
        default="auto",
        description="Form the distribution travels in; `auto`: `hidden` where servers hand the head out, else `probs`.",
    )
    probs_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="dtype of target_probs."
    )
    rows: Literal["supervised", "all"] = Field(default="supervised", description="Rows of the distribution to project.")
    vocab_mapping: Path | None = Field(default=None, description="File with the vocabulary mapping.")
    timeout: float = Field(default=120.0, gt=0, description="Seconds one attempt may take.")
    max_retries: int = Field(default=3, ge=0, description="Further attempts after a failed one, elsewhere if there is.")
    retry_timeout: float = Field(
        default=60.0,
        ge=0,
        description="Seconds from its first failure for which a batch is asked for beyond `max_retries`, while no "
        "server can be reached.",
    )
    ready_timeout: float = Field(default=600.0, ge=0, description="Seconds to wait for servers that are still loading.")
    min_servers: int | None = Field(
        default=None,
        ge=1,
        description="Servers that must be ready and alike to begin with; default all. The first in the list that is "
        "ready says what is served; others are left out until they serve it.",
    )

    @field_validator("urls", mode="before")
    @classmethod
    def _split_urls(cls, value: Any) -> Any:
        return tuple(url.strip() for url in value.split(",") if url.strip()) if isinstance(value, str) else value


def load_config(
    model: type[Config], *, path: Path | None, environment: Mapping[str, str], overrides: Mapping[str, Any]
) -> Config:
    """Merge the three sources and validate them.

    Args:
        model: `ServerConfig` or `ClientConfig`.
        path: YAML file, if any. environment: usually `os.environ`.
        overrides: what the command line gave; nested mappings are merged key by key.

    Raises:
        ConfigError: a file that cannot be read, an unknown key with the nearest name, or a wrong value.
    """
    values = _read_yaml(path) if path is not None else {}
    values = _merge(values, read_environment(model, environment))
    return build_model(model, _merge(values, overrides), f"{_title(model)} settings")


def read_environment(model: type[BaseModel], environment: Mapping[str, str]) -> dict[str, Any]:
    """Settings of a model from EAGLE_TARGET_NAME variables; `__` goes one mapping deeper.

    Raises:
        ConfigError: a variable of that prefix that neither a server nor a client has.
    """
    known = {*ServerConfig.model_fields, *ClientConfig.model_fields}
    values: dict[str, Any] = {}
    for variable, text in environment.items():
        if not variable.startswith(ENVIRONMENT_PREFIX):
            continue
        name, *keys = variable.removeprefix(ENVIRONMENT_PREFIX).lower().split(NESTING)
        if name not in known:
            near = nearest_name(name, known)
            raise ConfigError(f"environment variable {variable} is no setting, {near} (spelt {ENVIRONMENT_PREFIX}NAME)")
        if name in model.model_fields:
            value = text if is_secret(model.model_fields[name]) else parse_value(text)
            for key in reversed(keys):
                value = {key: value}
            values = _merge(values, {name: value})
    return values


def dump_config(config: BaseModel) -> str:
    """The settings as YAML, the way a file would hold them; secrets are left out."""
    secrets = {name for name, field in type(config).model_fields.items() if is_secret(field)}
    return yaml.safe_dump(config.model_dump(mode="json", exclude=secrets), sort_keys=False)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the settings file {path}: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # Also of a date that is none, a number of thousands of digits, and lists in lists without end.
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}, expected key: value lines")
    return {str(key): value for key, value in values.items()}


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _title(model: type[BaseModel]) -> str:
    return "server" if model is ServerConfig else "client"
