"""Code that comes with a checkpoint and computes tables when it is built."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from eagle_target_hf import HFAdapter, HFOptions

from eagle_target.errors import AdapterError

from . import tiny

if TYPE_CHECKING:
    from pathlib import Path

CODE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnRotary(torch.nn.Module):
    def __init__(self, head_dim):
        super().__init__()
        inv_freq = 1.0 / (10000.0 ** (torch.arange(0, head_dim, 2).float() / head_dim))
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(self, x, position_ids):
        angles = position_ids[..., None].float() * self.inv_freq
        angles = torch.cat([angles, angles], -1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.model.rotary_emb = OwnRotary(config.head_dim)

    def _init_weights(self, module):
        pass
"""


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "own"
    tiny.build("llama").save_pretrained(folder)
    (folder / "own.py").write_text(CODE)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_tables_of_a_checkpoint_s_own_code_are_those_it_computes(checkpoint: str) -> None:
    runner = HFAdapter.load(checkpoint, HFOptions(device="cpu", trust_remote_code=True))
    runner.set_aux_layers((0, 2, 3))
    ids, lengths = tiny.random_request(5, 3)

    aux = runner.forward_eagle3(ids, lengths).aux_hidden_states

    expected, _, _ = tiny.oracle(tiny.build("llama"), ids, lengths, (0, 2, 3))
    torch.testing.assert_close(aux, expected, atol=1e-5, rtol=1e-5)


def test_tables_that_cannot_be_computed_are_refused(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eagle_target_hf.tables.find_spec", lambda name: None)

    with pytest.raises(AdapterError, match=r"OwnForCausalLM has tables of its own: pip install"):
        HFAdapter.load(checkpoint, HFOptions(device="cpu", trust_remote_code=True))
