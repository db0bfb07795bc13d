"""No test needs a network: Python's sockets reach this machine alone, and all else is refused.

conftest.py loads it, and puts its folder on PYTHONPATH, where every Python process that a test starts finds
it (Python imports `sitecustomize` at its start). What C++ opens (gloo, torchrun's store) is between ranks.
"""

import errno
import functools
import ipaddress
import os
import socket
from collections.abc import Callable
from typing import Any

_getaddrinfo = socket.getaddrinfo


def _is_here(host: Any) -> bool:
    host = host.decode() if isinstance(host, bytes) else host
    mine = socket.gethostname()
    if host in (None, "", "localhost", mine) or host.startswith(f"{mine}."):
        return True
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    if address.is_loopback or address.is_unspecified:
        return True
    try:
        return host in {info[4][0] for info in _getaddrinfo(mine, None)}
    except OSError:
        return False


def _here_alone(call: Callable[..., Any], host_of: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which refuses calls for a host elsewhere. None stands for no host."""

    @functools.wraps(call)
    def checked(*arguments: Any, **options: Any) -> Any:
        host = host_of(*arguments, **options)
        if _is_here(host):
            return call(*arguments, **options)
        if "NETWORK_ATTEMPTS" in os.environ:  # a file: the program may hide the error
            with open(os.environ["NETWORK_ATTEMPTS"], "a") as file:
                file.write(f"{host}\n")
        raise OSError(errno.ENETUNREACH, f"tests run without a network, and this one asks for {host}")

    return checked


def _host_of_address(*arguments: Any, **_: Any) -> Any:
    """Of methods whose last argument is an address: a tuple, or the path of a Unix socket."""
    return arguments[-1][0] if isinstance(arguments[-1], tuple) else None


for _name in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, _name, _here_alone(getattr(socket.socket, _name), _host_of_address))
socket.getaddrinfo = _here_alone(_getaddrinfo, lambda host, *_, **__: host)
