"""Finding plugins: real distributions on the path, good ones, doubled ones and broken ones."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from eagle_target.errors import PluginError
from eagle_target.plugins.registry import Plugins, load_plugins, unusable_reason

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


ADAPTER = """
from eagle_target.plugins.adapter import Adapter
from eagle_target.plugins.hookspecs import hookimpl

class MyAdapter(Adapter):
    name = "{name}"

    @classmethod
    def engine_version(cls):
        {version}

    @classmethod
    def load(cls, model, options, aux_layer_ids=None):
        raise NotImplementedError

@hookimpl
def register_adapters(register):
    register(MyAdapter)
"""

SECRET_OPTIONS = """
from pydantic import Field, SecretStr
from eagle_target.errors import AdapterError
from eagle_target.plugins.options import PluginOptions

class MyOptions(PluginOptions):
    token: SecretStr = Field(description="Token.")

"""


class Site:
    """A folder on the path that distributions are installed in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def install(self, distribution: str, module: str, source: str, entry: str | None = None) -> None:
        info = self.folder / f"{distribution.replace('-', '_')}-1.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.5\n")
        (info / "entry_points.txt").write_text(f"[eagle_target]\n{module} = {entry or module}\n")
        (self.folder / f"{module}.py").write_text(source)

    def adapter(self, distribution: str, module: str, name: str, version: str = "return '9.9'") -> None:
        self.install(distribution, module, ADAPTER.format(name=name, version=version))

    def load(self) -> Plugins:
        return load_plugins.__wrapped__()

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join(filter(None, [str(self.folder), os.environ.get("PYTHONPATH")]))
        return subprocess.run(
            [sys.executable, "-m", "eagle_target", *arguments],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.syspath_prepend(tmp_path)
    yield Site(tmp_path)
    for name in [path.stem for path in tmp_path.glob("*.py")]:
        sys.modules.pop(name, None)


def test_ours_are_found_through_the_hooks_of_strangers() -> None:
    plugins = load_plugins()

    assert {origin.plugin.name: origin.distribution for origin in plugins.transports} == {
        "inprocess": "eagle-target",
        "nccl": "eagle-target",
        "shm": "eagle-target",
        "wire": "eagle-target",
    }
    assert plugins.adapters.origins["hf"].distribution == "eagle-target-hf"
    assert plugins.broken == []


def test_a_strangers_is_found_with_its_distribution_and_version(site: Site) -> None:
    site.adapter("good-one", "good_one", "good")

    origin = site.load().adapters.origins["good"]

    assert (origin.plugin.__name__, origin.distribution, origin.version) == ("MyAdapter", "good-one", "1.5")


def test_two_of_one_name_are_an_error_that_names_both(site: Site) -> None:
    site.adapter("dist-one", "module_one", "same")
    site.adapter("dist-two", "module_two", "same")

    with pytest.raises(PluginError) as caught:
        site.load()

    for part in ("'same'", "module_one.MyAdapter of dist-one", "module_two.MyAdapter of dist-two", "uninstall one"):
        assert part in str(caught.value)


def test_taking_a_name_of_ours_is_an_error(site: Site) -> None:
    site.adapter("other-hf", "other_hf", "hf")

    with pytest.raises(PluginError, match=r"eagle_target_hf\S* of eagle-target-hf and other_hf.MyAdapter of other-hf"):
        site.load()


def test_one_class_registered_twice_is_no_clash(site: Site) -> None:
    site.adapter("dist-one", "module_one", "same")
    site.install("dist-two", "module_two", "from module_one import MyAdapter, register_adapters\n")

    assert site.load().adapters.get("same").__module__ == "module_one"


HOOKS = (
    "from eagle_target.plugins.adapter import Adapter\nfrom eagle_target.plugins.hookspecs import hookimpl\n@hookimpl\n"
)
BROKEN = {
    "import": ("import no_such_module_of_anybody", "ModuleNotFoundError: No module named 'no_such_module_of_anybody'"),
    "syntax": ("def broken(:\n", "SyntaxError"),
    "exit": ("import sys\nsys.exit('needs a licence')", "SystemExit: needs a licence"),
    "own_error": ("from eagle_target.errors import AdapterError\nraise AdapterError('no GPU')", "AdapterError: no GPU"),
    "misspelt": (HOOKS + "def register_adapter(register): pass\n", "unknown hook 'register_adapter'"),
    "arguments": (HOOKS + "def register_adapters(registry): pass\n", "registry"),
    "raising": (HOOKS + "def register_transports(register): raise RuntimeError('boom')\n", "RuntimeError: boom"),
    "instance": (HOOKS + "def register_adapters(register): register(object())\n", "no subclass of"),
    "wrong_kind": (
        HOOKS + "def register_transports(register): register(Adapter)\n",
        "plugins.adapter.Adapter'> is registered, which is no subclass of eagle_target.plugins.transport.Transport",
    ),
    "nameless": (
        HOOKS + "def register_adapters(register): register(Adapter)\n",
        "eagle_target.plugins.adapter.Adapter has no name",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_is_reported_by_name_and_left_out(
    site: Site, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    source, reason = BROKEN[case]
    site.install("broken-dist", f"broken_{case}", source)
    site.adapter("good-one", "good_one", "good")

    plugins = site.load()

    (broken,) = plugins.broken
    assert (broken.name, broken.distribution) == (f"broken_{case}", "broken-dist")
    assert reason in broken.reason
    assert f"plugin broken_{case} of broken-dist is broken" in caplog.text
    assert {"good", "hf"} <= {*plugins.adapters.origins}


def test_an_entry_point_to_nowhere_is_reported(site: Site) -> None:
    site.install("broken-dist", "nowhere", "", entry="nowhere:plugin")

    assert "AttributeError" in site.load().broken[0].reason


def test_broken_plugins_do_not_take_the_command_down(site: Site) -> None:
    for case, (source, _) in BROKEN.items():
        site.install(f"dist-{case}", f"broken_{case}", source)
    site.adapter("shaky-dist", "shaky", "shaky", version="raise OSError('no driver')")

    result = site.run("plugins")

    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    for case in BROKEN:
        assert f"broken_{case}" in result.stdout
    (shaky,) = [line for line in result.stdout.splitlines() if "shaky" in line]
    assert "no: broken: OSError: no driver" in shaky


def test_a_duplicate_ends_the_command_with_one_line(site: Site) -> None:
    site.adapter("other-hf", "other_hf", "hf")

    result = site.run("plugins")

    assert result.returncode == 1
    assert result.stderr.startswith("error: two adapters are called 'hf'")
    assert "Traceback" not in result.stderr


def test_a_secret_option_reaches_the_engine_and_is_not_printed(site: Site) -> None:
    source = ADAPTER.format(name="gated", version="return '1'")
    source = source.replace("class MyAdapter", SECRET_OPTIONS + "class MyAdapter")
    source = source.replace("    name =", "    options_model = MyOptions\n    name =")
    source = source.replace(
        "raise NotImplementedError", "raise AdapterError('token is ' + options.token.get_secret_value())"
    )
    site.install("gated-dist", "gated", source)
    flags = ["serve", "--engine", "gated", "--model", "m", "--port", "0", "-o", "token=abc"]

    printed = site.run(*flags, "--print-config")
    served = site.run(*flags)

    assert printed.returncode == 0, printed.stderr
    assert "abc" not in printed.stdout
    assert "error: cannot serve m: token is abc" in served.stderr


def test_failing_to_tell_whether_it_is_usable_is_unusable(site: Site) -> None:
    site.adapter("shaky-dist", "shaky_two", "shaky", version="raise OSError('no driver')")

    assert unusable_reason(site.load().adapters.get("shaky")) == "broken: OSError: no driver"


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(PluginError, match="there is no transport 'wirre', did you mean 'wire'"):
        load_plugins().transports.get("wirre")


def test_a_name_like_no_other_gets_the_list() -> None:
    with pytest.raises(PluginError, match="there is no transport 'zzz', known: inprocess, nccl, shm, wire"):
        load_plugins().transports.get("zzz")


def test_one_of_ours_that_is_not_installed_says_how_to_install_it() -> None:
    with pytest.raises(PluginError, match="adapter 'vllm' is not installed: pip install eagle-target-vllm"):
        Plugins().adapters.get("vllm")
