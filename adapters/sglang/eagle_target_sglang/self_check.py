"""At start: a short random prompt through the engine, against the checkpoint's own transformers modules."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from eagle_target.errors import AdapterError
from eagle_target_sglang.versions import engine_versions

if TYPE_CHECKING:
    from eagle_target_sglang.options import SGLangOptions
    from eagle_target_sglang.runner import SGLangTargetRunner

logger = logging.getLogger(__name__)

PROMPT_TOKENS = 128
# transformers norms its last hidden states, so a third layer is loaded to see the outputs of the first two.
LAYERS = (0, 1, 2)
# Checkpoints up to this size run whole, so that the last hidden states and the logits are compared, too.
WHOLE_BYTES = 512 << 20
# Differences relative to the norm: of the first two layers, and of what comes after all of them.
TOLERANCES = {"float32": (1e-3, 5e-3)}
ROUNDED_TOLERANCES = (5e-2, 0.2)


def check_parity(runner: SGLangTargetRunner, model: str, options: SGLangOptions, dtype: str, rank: int) -> None:
    """Refuse an engine whose hidden states are not the checkpoint's. Every rank calls it, rank 0 compares.

    A checkpoint that transformers cannot run here (quantised, or of no architecture it knows) is not checked, which
    is logged.

    Raises:
        AdapterError: names the layer, the difference and the installed versions.
    """
    info = runner.info
    if info.num_layers < len(LAYERS):
        logger.warning("%s is not self-checked: it has only %d layers", model, info.num_layers)
        return
    length = min(PROMPT_TOKENS, runner.limits.max_seq_len)
    prompt = torch.randint(0, info.vocab_size, (length,), generator=torch.Generator().manual_seed(1))
    runner.set_aux_layers(LAYERS)
    forward = runner.forward_eagle3(prompt.to(info.device), [length])
    logits = runner.compute_logits(forward.last_hidden_states)
    if rank:
        return
    whole = _is_small(model)
    try:
        states, expected_logits = _run_transformers(model, options, dtype, prompt, whole=whole)
    except Exception as error:  # noqa: BLE001 - whatever a checkpoint's own code raises
        logger.warning("%s is not self-checked, transformers cannot run it: %s: %s", model, type(error).__name__, error)
        return
    first, deep = TOLERANCES.get(dtype, ROUNDED_TOLERANCES)
    aux = torch.split(forward.aux_hidden_states, info.hidden_size, dim=-1)
    compared = [(f"layer {layer}", aux[layer], states[layer + 1], first) for layer in LAYERS[:2]]
    if whole:
        compared.append(("the last hidden states", forward.last_hidden_states, states[-1], deep))
        compared.append(("the logits", logits, expected_logits, deep))
    for what, given, expected, tolerance in compared:
        _compare(what, given, expected, tolerance, model)


def _compare(what: str, given: torch.Tensor, expected: torch.Tensor, tolerance: float, model: str) -> None:
    difference = float((given.cpu().float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-6))
    if not difference <= tolerance:
        raise AdapterError(
            f"{engine_versions()} computes {model} wrongly: {what} of a random prompt differs from transformers by "
            f"{difference:.1e} of its norm, {tolerance:.0e} is allowed. Install the transformers that this SGLang pins "
            "(pip show sglang), see whether --engine hf finds the checkpoint whole, or set self_check=false if you "
            "know better"
        )


@torch.no_grad()
def _run_transformers(
    model: str, options: SGLangOptions, dtype: str, prompt: torch.Tensor, *, whole: bool
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Hidden states `[tokens, hidden]`, embeddings first, and logits; of the first layers only, unless `whole`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    source: dict[str, Any] = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    config = AutoConfig.from_pretrained(model, **source)
    if options.quantization or getattr(config, "quantization_config", None) or options.load_format == "dummy":
        raise NotImplementedError("its weights are quantised or not the checkpoint's")
    if not whole:
        _keep_layers(config.get_text_config(), len(LAYERS))
    loaded = AutoModelForCausalLM.from_pretrained(model, config=config, dtype=getattr(torch, dtype), **source).eval()
    output = loaded(input_ids=prompt[None], output_hidden_states=True, use_cache=False)
    return tuple(state[0] for state in output.hidden_states), output.logits[0]


def _keep_layers(config: Any, count: int) -> None:
    config.num_hidden_layers = count
    for name, value in list(vars(config).items()):
        if name.endswith("layer_types") and isinstance(value, list | tuple):
            setattr(config, name, list(value)[:count])


def _is_small(model: str) -> bool:
    files = [file for pattern in ("*.safetensors", "*.bin") for file in Path(model).glob(pattern)]
    return bool(files) and sum(file.stat().st_size for file in files) <= WHOLE_BYTES
