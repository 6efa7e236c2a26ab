"""What SGLang is called in messages, and which options make a forward fit."""

from __future__ import annotations

from functools import partial

from eagle_target.plugins import engine_errors
from eagle_target_sglang.versions import engine_versions

engine_call = partial(
    engine_errors.engine_call,
    engine=engine_versions(),
    memory_remedy="lower max_total_tokens, which sizes the KV pool and a forward, or mem_fraction_static",
)
