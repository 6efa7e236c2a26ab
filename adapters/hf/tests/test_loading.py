"""Loading from a path, with options and without; and what is refused."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from eagle_target_hf import HFAdapter, HFEagle3TargetModel, HFOptions

from eagle_target.errors import AdapterError, ConfigError
from eagle_target.plugins.options import build_model

from . import tiny

if TYPE_CHECKING:
    from pathlib import Path

AUX = (0, 2, 3)


def save(directory: Path, layout: str = "llama", **options: Any) -> str:
    tiny.build(layout).save_pretrained(directory, **options)
    return str(directory)


@pytest.mark.parametrize("layout", ["llama", "llama-tied", "qwen3-moe", "gpt2", "llava", "gemma3-vision"])
def test_loaded_target_equals_the_saved_model(layout: str, tmp_path: Path) -> None:
    path = save(tmp_path, layout)
    input_ids, seq_lens = tiny.random_request(5, 9)

    runner = HFAdapter.load(path, HFOptions(device="cpu"))
    runner.set_aux_layers(AUX)
    forward = runner.forward_eagle3(input_ids, seq_lens)

    aux, _, logits = tiny.oracle(tiny.build(layout), input_ids, seq_lens, AUX)
    torch.testing.assert_close(forward.aux_hidden_states, aux, atol=1e-5, rtol=1e-5)
    given = runner.compute_logits(forward.last_hidden_states)
    torch.testing.assert_close(given, logits, atol=1e-5, rtol=1e-5)
    assert runner.info.model == path


@pytest.mark.parametrize(("option", "dtype"), [("auto", "bfloat16"), ("float32", "float32"), ("float16", "float16")])
def test_dtype_is_the_checkpoint_s_unless_asked_for(option: str, dtype: str, tmp_path: Path) -> None:
    tiny.build("llama").to(torch.bfloat16).save_pretrained(tmp_path)

    runner = HFAdapter.load(str(tmp_path), build_model(HFOptions, {"dtype": option, "device": "cpu"}, "options"))

    assert runner.info.dtype == dtype


def test_attention_and_batch_options_arrive(tmp_path: Path) -> None:
    path = save(tmp_path)

    runner = HFAdapter.load(path, HFOptions(device="cpu", attn_implementation="eager", max_batch_tokens=9))

    assert runner._proven is not None
    assert runner._proven.execution.architecture.config._attn_implementation == "eager"
    assert runner._max_batch_tokens == 9


def test_device_map_spreads_the_target(tmp_path: Path) -> None:
    path = save(tmp_path)
    input_ids, seq_lens = tiny.random_request(5, 9)

    runner = HFAdapter.load(path, HFOptions(device_map="cpu"))

    runner.set_aux_layers(AUX)
    aux, _, _ = tiny.oracle(tiny.build("llama"), input_ids, seq_lens, AUX)
    given = runner.forward_eagle3(input_ids, seq_lens).aux_hidden_states
    torch.testing.assert_close(given, aux, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", ["llama", "llama-tied", "llava"])
def test_weights_offloaded_by_accelerate_give_the_same(layout: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    input_ids, seq_lens = tiny.random_request(5, 9)
    model = accelerate.cpu_offload(tiny.build(layout), execution_device=torch.device("cpu"))

    target = HFEagle3TargetModel(model, AUX)

    aux, last, logits = tiny.oracle(tiny.build(layout), input_ids, seq_lens, AUX)
    given = target.runner.forward_eagle3(input_ids, seq_lens).aux_hidden_states
    torch.testing.assert_close(given, aux, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(target.runner.compute_logits(last), logits, atol=1e-5, rtol=1e-5)
    assert target.runner.draft_head(torch.tensor([1])) is None
    with pytest.raises(AdapterError, match="offloaded"):
        target.input_embedding_weight()


def test_device_map_without_accelerate_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path)
    monkeypatch.setattr("eagle_target_hf.loading.find_spec", lambda name: None)

    with pytest.raises(AdapterError, match=r"needs accelerate: pip install 'eagle-target-hf\[device-map\]'"):
        HFAdapter.load(path, HFOptions(device_map="auto"))


def test_missing_model_keeps_the_engine_s_message(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"could not load .*nowhere") as caught:
        HFAdapter.load(str(tmp_path / "nowhere"), HFOptions(local_files_only=True))

    assert str(caught.value.__cause__) in str(caught.value)


def test_broken_weights_keep_the_engine_s_message(tmp_path: Path) -> None:
    path = save(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a safetensors file")

    with pytest.raises(AdapterError, match="could not load"):
        HFAdapter.load(path, HFOptions(device="cpu"))


def test_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    config = transformers.T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=16)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)

    with pytest.raises(AdapterError, match="'t5' model is no causal language model"):
        HFAdapter.load(str(tmp_path), HFOptions(device="cpu"))


def test_unknown_engine_quantisation_is_an_adapter_error(tmp_path: Path) -> None:
    path = save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))

    with pytest.raises(AdapterError, match="could not load"):
        HFAdapter.load(path, HFOptions(device="cpu"))


def test_device_and_device_map_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="device or device_map, not both"):
        build_model(HFOptions, {"device": "cpu", "device_map": "auto"}, "options")


def test_from_pretrained_takes_options_by_keyword(tmp_path: Path) -> None:
    path = save(tmp_path)

    target = HFEagle3TargetModel.from_pretrained(
        path, (3, 0, 2), dtype=torch.bfloat16, device=torch.device("cpu"), max_batch_tokens=64, encoding="logits"
    )

    assert target.aux_layer_ids == AUX
    assert target.model_info()["dtype"] == "bfloat16"
    assert target.model_info()["encoding"] == "logits"
    target.close()


def test_from_pretrained_names_the_nearest_option(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'max_batch_tokens'"):
        HFEagle3TargetModel.from_pretrained(tmp_path, max_batch_token=3)


def test_every_option_is_described() -> None:
    assert all(field.description for field in HFOptions.model_fields.values())
