"""What importing the package costs, and what it offers."""

from __future__ import annotations

import subprocess
import sys

import pytest

import eagle_target

LIGHT = ("", ".plugins.hookspecs", ".plugins.options", ".plugins.adapter", ".contract.target", ".errors")
HEAVY = ("torch", "numpy", "transformers", "safetensors", "starlette", "uvicorn", "urllib3", "vllm", "sglang")


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.strip()


def test_light_modules_import_no_torch() -> None:
    imports = "; ".join(f"import eagle_target{name}" for name in LIGHT)
    assert run_python(f"import sys; {imports}; print([name for name in {HEAVY!r} if name in sys.modules])") == "[]"


def test_core_imports_no_engine_and_no_server() -> None:
    banned = ("transformers", "starlette", "uvicorn", "urllib3", "vllm", "sglang")
    code = f"import sys, eagle_target.colocated; print([name for name in {banned!r} if name in sys.modules])"
    assert run_python(code) == "[]"


def test_tiny_targets_import_transformers_only_when_one_is_saved() -> None:
    assert run_python("import sys, eagle_target.testing.tiny; print('transformers' in sys.modules)") == "False"


@pytest.mark.parametrize(
    "name", ["VocabMapping", "TargetRunner", "Eagle3TargetBatch", "RunnerEagle3TargetModel", "SupervisionRequest"]
)
def test_public_names_of_the_core_are_loaded_on_first_use(name: str) -> None:
    assert getattr(eagle_target, name).__name__ == name


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        eagle_target.Nonsense  # noqa: B018
