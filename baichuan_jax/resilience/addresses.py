"""Where the processes of a run listen, and who could reach them there.

jax's coordination service and Gloo trust whoever connects: a stranger who calls himself process 1
ends the run. So each listens on one address, the one by which the run's own processes reach it, and
on loopback where that is enough. What else this program's processes listen on is read from the
kernel's tables.
"""

import contextlib
import errno
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

from baichuan_jax.config.schema import ConfigError

# Before the path of a socket that is a file.
SOCKET = "unix:"
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]", "::1")
# host:port on which jax's service listens, if the user chooses it: jax reads it, too.
BIND_VARIABLE = "JAX_COORDINATOR_BIND_ADDRESS"
# The state LISTEN in the kernel's tables.
_LISTEN = "0A"


def resolve(host: str) -> list[str]:
    """The addresses that a name or an address means, as numbers; the most reachable one first.

    Raises ConfigError where it means none.
    """
    try:
        found = socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)
    # A name with an empty or too long part is a UnicodeError.
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"no address of {host!r} is known on this host: {error}") from None
    addresses = dict.fromkeys(str(entry[4][0]) for entry in found)
    # Debian gives the host's own name 127.0.1.1 as well. IPv4 first: a host with both may have no
    # route for IPv6.
    return sorted(addresses, key=lambda each: (_is_local(each), ":" in each))


def own_address(host: str) -> str:
    """The address of this host that a name or an address means. Raises ConfigError for none."""
    addresses = resolve(host)
    own = next((address for address in addresses if _is_own(address)), None)
    if own is None:
        meant = host if is_number(host) else f"{host} is {', '.join(addresses)}, which"
        raise ConfigError(
            f"{meant} is no address of this host: process 0 must run on the host that the address "
            "names. Where something between the hosts translates addresses, set "
            f"{BIND_VARIABLE}=ADDRESS:PORT for process 0 to where it is to listen"
        )
    return own


def refuse_loopback(host: str, advice: str) -> None:
    """Raise ConfigError where the name of this host means loopback here, in a run of several.

    Not where the user chooses where process 0 listens, nor for a name that is not known yet.
    """
    # Who gives loopback itself means it: "hosts" that are one machine.
    if host in _LOOPBACK or os.environ.get(BIND_VARIABLE):
        return
    try:
        best = resolve(host)[0]
    except ConfigError:
        return
    if ipaddress.ip_address(best).is_loopback:
        raise ConfigError(
            f"{host} is {best} on this host, as its /etc/hosts says, where no other host can reach "
            f"process 0; {advice}"
        )


def is_each_hosts_own(coordinator: str) -> bool:
    """Whether a coordinator's address is another one on each host."""
    return coordinator.startswith(SOCKET) or coordinator.rpartition(":")[0] in _LOOPBACK


def address_towards(host: str) -> str:
    """This host's address from which it reaches another, or itself. Sends nothing."""
    for address in resolve(host):
        # Choosing the route is all that connecting does here.
        with contextlib.suppress(OSError), socket.socket(_family(address), socket.SOCK_DGRAM) as s:
            s.connect((address, 9))
            return str(s.getsockname()[0])
    raise ConfigError(f"this host has no route to {host}")


def is_number(host: str) -> bool:
    """Whether it is an address itself, and no name."""
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


def join_port(address: str, port: int | str) -> str:
    """address:port, as jax and browsers read it."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def is_free(address: str, port: int) -> bool:
    """Whether process 0 could listen on a port of an address of this host."""
    try:
        with socket.socket(_family(address)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address, port))
    except OSError as error:
        # Any other error says nothing about the port.
        return error.errno != errno.EADDRINUSE
    return True


def listening(process: int | str = "self") -> list[tuple[str, int]]:
    """(address, port) of all TCP sockets on which a process of this host listens, in order."""
    mine = set()
    with contextlib.suppress(OSError):
        for file in Path(f"/proc/{process}/fd").iterdir():
            # It may have been closed since.
            with contextlib.suppress(OSError):
                mine.add(os.readlink(file))
    found = (line for name in ("tcp", "tcp6") for line in _table(f"/proc/{process}/net/{name}"))
    return sorted({(a, port) for a, port, inode in found if f"socket:[{inode}]" in mine})


def exposure(address: str) -> str | None:
    """Who but the hosts of a private network reaches an address, in words; None: nobody."""
    found = ipaddress.ip_address(address)
    if found.is_unspecified:
        return "all its addresses"
    return f"the public address {address}" if found.is_global else None


def _table(file: str) -> Iterator[tuple[str, int, str]]:
    """(address, port, inode) of a table's listening sockets."""
    with contextlib.suppress(OSError):
        for line in Path(file).read_text(encoding="ascii").splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTEN:
                address, _, port = fields[1].rpartition(":")
                yield _decode(address), int(port, 16), fields[9]


def _decode(text: str) -> str:
    """An address of the kernel's tables: words of 32 bits, in hexadecimal, in the host's order."""
    words = [int(text[i : i + 8], 16) for i in range(0, len(text), 8)]
    packed = ipaddress.ip_address(struct.pack(f"={len(words)}I", *words))
    mapped = getattr(packed, "ipv4_mapped", None)
    return str(mapped or packed)


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _is_own(address: str) -> bool:
    with contextlib.suppress(OSError), socket.socket(_family(address)) as probe:
        probe.bind((address, 0))
        return True
    return False


def _is_local(address: str) -> int:
    """0 for an address that other hosts can reach, 1 for one of this link, 2 for loopback."""
    found = ipaddress.ip_address(address)
    return 2 if found.is_loopback else int(found.is_link_local)
