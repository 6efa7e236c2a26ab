"""Imports stay cheap, nothing waits for a whole device, and the public names are pinned."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = ROOT / "eagle_target"
PLUGINS = sorted([*ROOT.glob("transports/*/eagle_target_*"), *ROOT.glob("adapters/*/eagle_target_*")])
SOURCES = sorted(path for folder in [CORE, *PLUGINS] for path in folder.rglob("*.py"))

# Loaded before anybody knows whether a tensor is needed.
WITHOUT_TORCH = [
    CORE / name
    for name in (
        "__init__.py",
        "__main__.py",
        "bench/processes.py",
        "cli/bench.py",
        "cli/main.py",
        "cli/plugins.py",
        "cli/serve.py",
        "cli/settings.py",
        "cli/supervise.py",
        "cli/verify.py",
        "cli/vocab.py",
        "config.py",
        "contract/target.py",
        "errors.py",
        "plugins/__init__.py",
        "plugins/adapter.py",
        "plugins/hookspecs.py",
        "plugins/options.py",
        "plugins/registry.py",
        "plugins/transport.py",
    )
] + [path / "__init__.py" for path in PLUGINS]
HEAVY = {"torch", "numpy", "transformers", "safetensors", "starlette", "uvicorn", "urllib3", "vllm", "sglang"}

# What ruff's banned-api does not see: waits for a whole device by other names, and the current stream or device of
# whatever thread it is.
DEVICE_WIDE = {
    "a wait for a whole device": re.compile(r"(cuda|accelerator)\.synchronize\(|cu(daDevice|Ctx)Synchronize"),
    "the current stream of no named device": re.compile(r"current_stream\(\s*\)"),
    "a CUDA device without a number": re.compile(r"""torch\.device\(\s*["']cuda["']\s*\)"""),
}

PUBLIC = [
    "BatchHandle",
    "DraftHead",
    "Eagle3TargetBackend",
    "Eagle3TargetBatch",
    "RemoteEagle3TargetModel",
    "RunnerEagle3TargetModel",
    "ServedTarget",
    "SupervisionRequest",
    "TargetForward",
    "TargetInfo",
    "TargetModelServer",
    "TargetRunner",
    "VocabMapping",
    "compute_supervision",
    "default_eagle3_aux_layer_ids",
    "load_target",
    "open_target",
]

# What a third party may import; docs/plugins.md and tests/thirdparty use nothing else.
PLUGIN_API = [
    "Adapter",
    "AdapterError",
    "ClientChannel",
    "ConfigError",
    "ConnectError",
    "ContractError",
    "ControlPlane",
    "DraftHead",
    "EngineDead",
    "IncomingBody",
    "PREFIX_BYTES",
    "PackedTensors",
    "PluginOptions",
    "ProtocolError",
    "Reply",
    "RowStore",
    "ServerChannel",
    "ServerEndpoint",
    "Sink",
    "SupervisionRequest",
    "TargetForward",
    "TargetInfo",
    "TargetRunner",
    "TransferTimeout",
    "Transport",
    "TransportError",
    "VocabMapping",
    "checkpoint_digest",
    "decode_header",
    "decode_tensors",
    "digest_after_loading",
    "encode_tensors",
    "engine_call",
    "header_length",
    "hookimpl",
    "hub_commit",
    "validate_aux_layer_ids",
    "writable_bytes",
]
TEST_KIT = [
    "AdapterConformance",
    "BFloat16Adapter",
    "BatchInvariantAdapter",
    "EmbeddingRunner",
    "InProcessTransportConformance",
    "MemoryControl",
    "ServedAdapterConformance",
    "TransportConformance",
    "WholeCheckpointConformance",
    "assert_same_batch",
    "loopback_server",
    "save_tiny_target",
    "server_process",
    "shuffled_mapping",
]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported_modules(path: Path, *, everywhere: bool = True) -> set[str]:
    """Modules a file imports: all of them, or only those that importing it imports."""
    nodes: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    found = set()
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name_of(path)} has a relative import"
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        in_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if everywhere or not (typing_only or in_function):
            nodes += ast.iter_child_nodes(node)
    return found


def packages(path: Path, *, everywhere: bool = True) -> set[str]:
    return {module.partition(".")[0] for module in imported_modules(path, everywhere=everywhere)}


def test_no_wait_for_a_whole_device_and_no_stream_or_device_by_accident() -> None:
    texts = {name_of(path): path.read_text(encoding="utf-8") for path in SOURCES}
    found = [(name, what) for name, text in texts.items() for what, bad in DEVICE_WIDE.items() if bad.search(text)]
    assert found == []


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("torch.cuda.synchronize(device)", True),
        ("cuda = torch.cuda\ncuda.synchronize()", True),
        ("runtime.cudaDeviceSynchronize()", True),
        ("torch.accelerator.synchronize()", True),
        ("torch.cuda.current_stream().synchronize()", True),
        ('torch.device("cuda")', True),
        ("torch.cuda.current_stream(device).record_event().synchronize()", False),
        ('torch.device("cuda", index)', False),
    ],
)
def test_what_waits_for_a_whole_device_is_found(line: str, found: bool) -> None:
    assert any(pattern.search(line) for pattern in DEVICE_WIDE.values()) == found


def test_what_the_command_loads_imports_no_torch() -> None:
    loaded = {name_of(path): packages(path, everywhere=False) & HEAVY for path in WITHOUT_TORCH}
    assert {name: heavy for name, heavy in loaded.items() if heavy} == {}


def test_importing_a_plugin_imports_no_torch() -> None:
    check = "import sys, importlib\nfor name in sys.argv[1:]:\n    importlib.import_module(name)\n"
    check += f"    assert not {HEAVY!r} & {{*sys.modules}}, (name, {HEAVY!r} & {{*sys.modules}})"
    command = [sys.executable, "-c", check, *(folder.name for folder in PLUGINS)]

    result = subprocess.run(command, capture_output=True, text=True, check=False)

    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("module", "pinned"),
    [("eagle_target", PUBLIC), ("eagle_target.plugins", PLUGIN_API), ("eagle_target.testing", TEST_KIT)],
)
def test_public_names_are_pinned_and_there(module: str, pinned: list[str]) -> None:
    public = importlib.import_module(module)
    assert public.__all__ == pinned
    for name in pinned:
        value = getattr(public, name)
        assert getattr(value, "__name__", name) in (name, "__getattr__"), name
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = public.no_such_name


def test_a_third_party_needs_no_more_than_the_plugin_api() -> None:
    toy = ROOT / "tests/thirdparty"
    documented = re.findall(r"```python\n(.*?)```", (ROOT / "docs/plugins.md").read_text(encoding="utf-8"), re.DOTALL)
    sources = [*documented, *(path.read_text(encoding="utf-8") for path in toy.rglob("*.py"))]
    used = {line for source in sources for line in re.findall(r"(?:from|import) (eagle_target(?!_)[\w.]*)", source)}
    assert used == {"eagle_target.plugins", "eagle_target.testing"}


def test_typing_is_shipped_and_no_folder_of_plugins_is_a_package() -> None:
    for folder in [CORE, *PLUGINS]:
        assert (folder / "py.typed").exists(), name_of(folder)
    for folder in {path.parents[depth] for path in PLUGINS for depth in (0, 1)}:
        assert not (folder / "__init__.py").exists(), name_of(folder)
