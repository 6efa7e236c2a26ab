"""Import-only stand-in for `sgl_kernel.kvcacheio`."""

from __future__ import annotations

from sgl_kernel import __getattr__  # noqa: F401
