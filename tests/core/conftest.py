"""The same random cases every time, and no deadline: other work may share the machine."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("eagle-target", deadline=None, derandomize=True, database=None, max_examples=30)
settings.load_profile("eagle-target")
