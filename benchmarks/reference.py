"""The reference in an environment of its own: `nemo-automodel` from PyPI and what its remote target imports.

The package pins much that has nothing to do with serving a target, CUDA kernels among it, so it goes in with
`--no-deps`, and beside it what `nemo_automodel.components.speculative.eagle.remote` really imports: its parent
package imports the draft models (transformers) and the data sets (datasets, pillow). Nothing is stubbed.

TORCH_INDEX_URL, TORCH_FIND_LINKS: where pip finds a build of torch, where the default index is not to be asked.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

from benchmarks.processes import ROOT

if TYPE_CHECKING:
    from pathlib import Path

VERSION = "0.7.0"
REQUIREMENTS = (
    "torch==2.13.0",
    "numpy==2.4.6",
    "requests==2.34.2",
    "transformers==5.18.0",
    "datasets==5.2.0",
    "pillow==13.0.0",
    "pyyaml==6.0.3",
)
PROBE = "import nemo_automodel.components.speculative.eagle.remote.server"
ENVIRONMENT = ROOT / ".bench" / "reference-venv"


def reference_python() -> Path:
    """The interpreter of the reference's environment, which is made where it is not there yet.

    Raises:
        subprocess.CalledProcessError: pip failed; what it said is on standard error.
    """
    python = ENVIRONMENT / "bin" / "python"
    ready = ENVIRONMENT / ".ready"
    wanted = "\n".join((*REQUIREMENTS, f"nemo-automodel=={VERSION}"))
    if ready.exists() and ready.read_text(encoding="utf-8") == wanted:
        return python
    print(f"making {ENVIRONMENT.relative_to(ROOT)} for nemo-automodel {VERSION}, once", flush=True)
    shutil.rmtree(ENVIRONMENT, ignore_errors=True)
    ENVIRONMENT.parent.mkdir(exist_ok=True)
    _run(sys.executable, "-m", "venv", str(ENVIRONMENT))
    _run(str(python), "-m", "pip", "install", "-q", *_torch_places(), *REQUIREMENTS)
    _run(str(python), "-m", "pip", "install", "-q", "--no-deps", f"nemo-automodel=={VERSION}")
    _run(str(python), "-c", PROBE)
    ready.write_text(wanted, encoding="utf-8")
    return python


def _torch_places() -> list[str]:
    places = []
    for variable, flag in (("TORCH_INDEX_URL", "--extra-index-url"), ("TORCH_FIND_LINKS", "--find-links")):
        if os.environ.get(variable):
            places += [flag, os.environ[variable]]
    return places


def _run(*command: str) -> None:
    subprocess.run(command, check=True, stdout=sys.stderr, cwd=ROOT)
