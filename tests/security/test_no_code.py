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


def test_nothing_from_a_peer_is_run() -> None:
    for path in SHIPPED:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not runs_what_it_reads(node), f"{path.relative_to(ROOT)}: {ast.unparse(node)}"


def runs_what_it_reads(node: ast.AST) -> bool:
    if isinstance(node, ast.Import):
        # pickle has the name of what `torch.load` raises when it refuses a file.
        return bool((UNPICKLERS - {"pickle"}) & {alias.name.partition(".")[0] for alias in node.names})
    if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle":
        return node.attr != "UnpicklingError"
    if isinstance(node, ast.ImportFrom):
        return (node.module or "").partition(".")[0] in UNPICKLERS
    return isinstance(node, ast.Call) and call_runs_what_it_reads(node)


def call_runs_what_it_reads(call: ast.Call) -> bool:
    name = ast.unparse(call.func)
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    return (
        name in RUNNERS
        or given.get("allow_pickle") == "True"
        or given.get("trust_remote_code") == "True"
        or (name == "torch.load" and given.get("weights_only") != "True")
        # yaml.safe_load reads settings.
        or name == "yaml.load"
    )


@pytest.mark.parametrize(
    ("line", "runs"),
    [
        ("import dill", True),
        ("import pickle", False),
        ("from pickle import loads", True),
        ("pickle.loads(data)", True),
        ("pickle.UnpicklingError", False),
        ("eval(text)", True),
        ("torch.load(path)", True),
        ("torch.load(path, weights_only=True)", False),
        ("numpy.load(path, allow_pickle=True)", True),
        ("AutoModel.from_pretrained(name, trust_remote_code=True)", True),
        ("yaml.load(text)", True),
        ("yaml.safe_load(text)", False),
    ],
)
def test_what_runs_is_found(line: str, runs: bool) -> None:
    assert any(runs_what_it_reads(node) for node in ast.walk(ast.parse(line))) == runs
