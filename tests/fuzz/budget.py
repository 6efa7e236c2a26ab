"""How many inputs are tried: few in CI, always the same; many, and others each time, in `make fuzz`."""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, settings

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]


def tries(times: float) -> settings:
    """So many times what the profile says."""
    profile = settings.default or settings()
    return settings(profile, max_examples=max(int(profile.max_examples * times), 1), suppress_health_check=SLOW)


def tries_against_the_clock(times: float) -> settings:
    """Where sockets and processes take part: what fails is not made smaller, for it may depend on the moment."""
    return settings(tries(times), phases=[Phase.explicit, Phase.generate])
