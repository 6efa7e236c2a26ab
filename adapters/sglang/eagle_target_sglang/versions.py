"""Which SGLang is installed, and what it runs on; imports none of it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution; None where it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def engine_versions() -> str:
    """`SGLang 0.5.23 (torch ..., transformers ...)` for messages."""
    parts = ", ".join(f"{name} {installed_version(name)}" for name in ("torch", "transformers"))
    return f"SGLang {installed_version('sglang')} ({parts})"
