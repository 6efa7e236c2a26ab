"""Make an environment that runs the real SGLang on a CPU: `python make.py 0.5.23 .venv-sglang`.

uv is taken from the environment that runs this. PIP_FIND_LINKS: where a CPU build of torch lies, if not on the index.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ADAPTER = HERE.parents[1]
ROOT = ADAPTER.parents[1]
TORCHVISION = "0.28.0"
STAND_INS = "sglang_stand_ins.pth"


def main() -> None:
    """Make or refresh one environment."""
    version, folder = sys.argv[1], Path(sys.argv[2]).resolve()
    python = folder / "bin" / "python"
    if not python.exists():
        uv("venv", "--python", "3.11", str(folder))
    requirements = [str(HERE / f"requirements-{name}.txt") for name in (version, "common")]
    install(python, *find_links(), *(part for file in requirements for part in ("-r", file)))
    # Their own pins would replace torch by a CUDA build.
    install(python, "--no-deps", f"sglang=={version}", f"torchvision=={TORCHVISION}")
    install(python, "--no-deps", "--no-build-isolation", "-e", str(ROOT), "-e", str(ADAPTER))
    packages = folder / "lib" / "python3.11" / "site-packages"
    stand_ins = f"{HERE / 'stand_ins'}\nimport torchvision_schemas\n"
    (packages / STAND_INS).write_text(stand_ins, encoding="utf-8")


def find_links() -> list[str]:
    """Pass on PIP_FIND_LINKS, which uv does not read."""
    places = os.environ.get("PIP_FIND_LINKS")
    return ["--find-links", places] if places else []


def install(python: Path, *arguments: str) -> None:
    """Install into an environment."""
    uv("pip", "install", "-q", "--python", str(python), *arguments)


def uv(*arguments: str) -> None:
    """Run uv."""
    subprocess.run([sys.executable, "-m", "uv", *arguments], check=True)


if __name__ == "__main__":
    main()
