"""Settings: where they come from, which source wins, and what a wrong one is told."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from eagle_target.config import ClientConfig, ServerConfig, dump_config, load_config, read_environment
from eagle_target.errors import ConfigError

if TYPE_CHECKING:
    from pydantic import BaseModel


def load(
    text: str | None = None,
    environment: dict[str, str] | None = None,
    folder: Path | None = None,
    **overrides: Any,
) -> ServerConfig:
    path = None
    if text is not None and folder is not None:
        path = folder / "settings.yaml"
        path.write_text(text)
    return load_config(ServerConfig, path=path, environment=environment or {}, overrides=overrides)


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    text = "model: file\nport: 1\nmax_queue: 1\nhost: file-host\n"
    environment = {"EAGLE_TARGET_PORT": "2", "EAGLE_TARGET_MAX_QUEUE": "2"}

    config = load(text, environment, tmp_path, max_queue=3)

    assert (config.model, config.host, config.port, config.max_queue, config.max_mappings) == (
        "file",
        "file-host",
        2,
        3,
        ServerConfig.model_fields["max_mappings"].default,
    )


def test_nested_options_are_merged_key_by_key(tmp_path: Path) -> None:
    text = (
        "model: m\n"
        "engine_options: {dtype: float32, depth: {a: 1, b: 1}}\n"
        "transport_options: {wire: {x: 1}, shm: {y: 1}}\n"
    )
    environment = {
        "EAGLE_TARGET_ENGINE_OPTIONS__DTYPE": "bfloat16",
        "EAGLE_TARGET_ENGINE_OPTIONS__DEPTH__B": "2",
        "EAGLE_TARGET_TRANSPORT_OPTIONS__WIRE__Z": "true",
    }

    config = load(text, environment, tmp_path, engine_options={"extra": 3})

    assert config.engine_options == {"dtype": "bfloat16", "depth": {"a": 1, "b": 2}, "extra": 3}
    assert config.transport_options == {"wire": {"x": 1, "z": True}, "shm": {"y": 1}}


def test_a_mapping_variable_and_its_keys_are_merged() -> None:
    environment = {
        "EAGLE_TARGET_ENGINE_OPTIONS": '{"a": 1, "b": 1}',
        "EAGLE_TARGET_ENGINE_OPTIONS__B": "2",
        "EAGLE_TARGET_MODEL": "m",
    }

    assert load(environment=environment).engine_options == {"a": 1, "b": 2}


@pytest.mark.parametrize("value", ["0,3,5", "[0, 3, 5]"])
def test_lists_in_the_environment_are_json_or_comma_separated(value: str) -> None:
    environment = {"EAGLE_TARGET_MODEL": "m", "EAGLE_TARGET_AUX_LAYER_IDS": value}

    assert load(environment=environment).aux_layer_ids == (0, 3, 5)


def test_names_are_split_at_commas() -> None:
    environment = {"EAGLE_TARGET_MODEL": "m", "EAGLE_TARGET_TRANSPORTS": "shm, wire"}
    urls = {"EAGLE_TARGET_URLS": "http://a:1, http://b:2,"}

    assert load(environment=environment).transports == ("shm", "wire")
    config = load_config(ClientConfig, path=None, environment=urls, overrides={})
    assert config.urls == ("http://a:1", "http://b:2")


@pytest.mark.parametrize("text", ["::", "2024-10-01", "1234567", "1.10", "4e12", "yes", "0x10", "1:30", "a: b"])
def test_text_in_the_environment_stays_as_it_is(text: str) -> None:
    assert load(environment={"EAGLE_TARGET_MODEL": text}).model == text


def test_settings_of_the_other_side_are_not_taken_and_not_refused() -> None:
    environment = {"EAGLE_TARGET_URLS": "http://a:1", "EAGLE_TARGET_MODEL": "m", "OTHER": "x"}

    assert read_environment(ServerConfig, environment) == {"model": "m"}


def test_an_unknown_variable_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="EAGLE_TARGET_MAX_QUEU is no setting, did you mean 'max_queue'"):
        load(environment={"EAGLE_TARGET_MAX_QUEU": "1"}, model="m")


@pytest.mark.parametrize("where", ["file", "flag"])
def test_an_unknown_key_is_refused_with_the_nearest_name(tmp_path: Path, where: str) -> None:
    text, flags = ("max_que: 1", {}) if where == "file" else (None, {"max_que": 1})

    with pytest.raises(ConfigError, match="server settings: unknown option 'max_que', did you mean 'max_queue'"):
        load(text, {}, tmp_path, model="m", **flags)


def test_every_wrong_value_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load("port: 70000\nmax_queue: none\naux_layer_ids: [1, 2]\nlog_level: loud\ntransport_options: 3", {}, tmp_path)

    message = str(caught.value)
    for part in ("'model' is required", "'port'", "70000", "'max_queue'", "'log_level'", "'transport_options'"):
        assert part in message
    assert "aux_layer_ids" in message


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("PORT", "many"),
        ("PORT", "-1"),
        ("PORT", ""),
        ("PORT__X", "1"),
        ("BODY_TIMEOUT", "0"),
        ("SEND_TIMEOUT", "Infinity"),
        ("SEND_TIMEOUT", "NaN"),
        ("MODEL__NAME", "x"),
        ("AUX_LAYER_IDS", "1,x,2"),
        ("ENGINE_OPTIONS", "[1]"),
    ],
)
def test_wrong_values_in_the_environment_are_refused(variable: str, value: str) -> None:
    with pytest.raises(ConfigError, match=variable.partition("__")[0].lower()):
        load(environment={"EAGLE_TARGET_MODEL": "m", f"EAGLE_TARGET_{variable}": value})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- a\n- b\n", "holds a list"),
        (b"just text", "holds a str"),
        (b"a: [1, 2", "is not YAML"),
        (b"a: b: c", "is not YAML"),
        (b"\xff\xfe\x00", "cannot read"),
        (b"model: !!python/object/apply:os.system [echo]", "is not YAML"),
    ],
)
def test_a_file_that_holds_no_settings_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "settings.yaml"
    path.write_bytes(content)

    with pytest.raises(ConfigError, match=message):
        load_config(ServerConfig, path=path, environment={}, overrides={"model": "m"})


@pytest.mark.parametrize("name", ["absent.yaml", "."])
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot read the settings file"):
        load_config(ServerConfig, path=tmp_path / name, environment={}, overrides={"model": "m"})


def test_an_empty_file_is_no_settings(tmp_path: Path) -> None:
    assert load("# nothing\n", {}, tmp_path, model="m") == ServerConfig(model="m")


@pytest.mark.parametrize(
    "config",
    [
        ServerConfig(model="m"),
        ServerConfig(
            model="1234",
            aux_layer_ids=(0, 3, 5),
            engine_options={"revision": "2024-10-01", "nested": {"a": [1, 2.5, None, True]}},
            transports=("shm", "wire"),
            transport_options={"shm": {"folder": "/dev/shm"}},
            port_file=Path("/tmp/port"),
            host="::1",
            port=0,
        ),
        ClientConfig(urls=("http://a:1",), vocab_mapping=Path("map.safetensors"), probs_dtype="bfloat16"),
    ],
    ids=["server", "server-full", "client"],
)
def test_what_is_dumped_loads_back(tmp_path: Path, config: BaseModel) -> None:
    path = tmp_path / "dumped.yaml"
    path.write_text(dump_config(config))

    assert load_config(type(config), path=path, environment={}, overrides={}) == config
    assert "!!" not in path.read_text()
    assert list(yaml.safe_load(path.read_text())) == [name for name in type(config).model_fields if name != "token"]


@pytest.mark.parametrize("model", [ServerConfig, ClientConfig])
def test_every_setting_is_described(model: type[BaseModel]) -> None:
    for name, field in model.model_fields.items():
        assert field.description, name
