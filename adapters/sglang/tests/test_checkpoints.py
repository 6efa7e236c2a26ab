"""Whole checkpoints pass the check before SGLang starts; what is refused, the suites try."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from eagle_target.checkpoints.loading import check_checkpoint

from .checkpoints import ARCHITECTURES, save_checkpoint
from .engines import on_this_version

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.engine_sglang, pytest.mark.filterwarnings("default")]


@pytest.mark.parametrize("architecture", on_this_version(ARCHITECTURES))
def test_a_whole_checkpoint_passes(architecture: str, tmp_path: Path) -> None:
    assert check_checkpoint(str(save_checkpoint(tmp_path, architecture, "bfloat16")))
