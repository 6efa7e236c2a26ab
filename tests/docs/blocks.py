"""Finds the fenced blocks of the documentation, and fits them to a small target on this machine."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LANGUAGES = {"python", "sh", "yaml", "toml", "text"}


@dataclass(frozen=True)
class Block:
    """A fenced block and where it stands."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.page.name}:{self.line}"

    def fit(self, replacements: Mapping[str, str]) -> str:
        """The text with models, addresses and the like replaced by what this machine has."""
        text = self.text
        for old, new in replacements.items():
            text = text.replace(old, new)
        return text


def read_blocks(page: Path) -> list[Block]:
    """Every fenced block of a page."""
    text = page.read_text(encoding="utf-8")
    return [Block(page, text.count("\n", 0, match.start()) + 1, match[1], match[2]) for match in FENCE.finditer(text)]


def blocks_of(*languages: str) -> list[Block]:
    """Every block in one of the languages, on any page."""
    return [block for page in PAGES for block in read_blocks(page) if block.language in languages]
