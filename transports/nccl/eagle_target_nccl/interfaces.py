"""At which addresses NCCL would listen: it takes its interfaces from the environment, for a whole process at once."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import socket
import struct
from pathlib import Path

SETTING = "NCCL_SOCKET_IFNAME"
IPV6_ADDRESSES = Path("/proc/net/if_inet6")
# ioctl(2): the IPv4 address of an interface, in a `struct ifreq`.
SIOCGIFADDR = 0x8915


def refusal(address: str, whose: str) -> str | None:
    """Why NCCL might listen elsewhere than at an address; None where it cannot.

    Args:
        address: of this machine. whose: `the server` or `the client`.
    """
    setting = os.environ.get(SETTING, "")
    allowed = [name for _, name in socket.if_nameindex() if setting and is_allowed(name, setting)]
    if allowed and all(_has(name, address) for name in allowed):
        return None
    would = f"{SETTING} is {setting!r}, which allows {sorted(allowed)}" if setting else f"{SETTING} is not set"
    names = [f"={name}" for _, name in socket.if_nameindex() if _has(name, address)]
    return (
        f"NCCL would listen elsewhere than at {address}, where {whose} is reached: {would}. Set it to the interface "
        f"with that address, {names[0] if names else 'there is none on this machine'}, before the process starts"
    )


def is_allowed(name: str, setting: str) -> bool:
    """Whether NCCL may use an interface: `eth,ib` are beginnings of names, `=eth0` whole ones, `^` all but these."""
    excludes = setting.startswith("^")
    rest = setting[1:] if excludes else setting
    exact = rest.startswith("=")
    listed = [each for each in (rest[1:] if exact else rest).split(",") if each]
    found = any(name == each if exact else name.startswith(each) for each in listed)
    return found != excludes


def _has(name: str, address: str) -> bool:
    wanted = ipaddress.ip_address(address)
    return any(wanted in network for network in _networks(name))


def _networks(name: str) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    """An interface's addresses; of the loopback, whose every address is this machine's, the whole network."""
    found: list[ipaddress.IPv4Network | ipaddress.IPv6Network] = []
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        request = struct.pack("256s", name.encode()[:15])
        address = socket.inet_ntoa(fcntl.ioctl(asking.fileno(), SIOCGIFADDR, request)[20:24])
        is_loopback = ipaddress.ip_address(address).is_loopback
        found.append(ipaddress.IPv4Network(f"{address}/{8 if is_loopback else 32}", strict=False))
    with contextlib.suppress(OSError):
        for line in IPV6_ADDRESSES.read_text(encoding="ascii").splitlines():
            digits, *_, interface = line.split()
            if interface == name:
                found.append(ipaddress.IPv6Network(int(digits, 16)))
    return found
