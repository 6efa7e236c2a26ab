"""Nothing that a peer sends is run: no pickle, no eval, and remote code only where it was asked for."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = [ROOT / "eagle_target", *ROOT.glob("transports/*/eagle_target_*"), *ROOT.glob("adapters/*/eagle_target_*")]
SHIPPED = sorted(path for folder in FOLDERS for path in folder.rglob("*.py"))
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
RUNNERS = {"eval", "exec", "__import__"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_from_a_peer_is_run(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            # pickle has the name of what `torch.load` raises when it refuses a file.
            assert not (UNPICKLERS - {"pickle"}) & {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle":
            assert node.attr == "UnpicklingError"
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").partition(".")[0] not in UNPICKLERS
        elif isinstance(node, ast.Call):
            check_call(node)


def check_call(call: ast.Call) -> None:
    name = ast.unparse(call.func)
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    assert name not in RUNNERS
    assert given.get("allow_pickle") != "True"
    assert given.get("trust_remote_code") != "True"
    if name == "torch.load":
        assert given.get("weights_only") == "True"
    if name == "yaml.load":
        raise AssertionError("yaml.safe_load reads settings")
