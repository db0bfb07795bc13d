"""No test needs a network: Python's sockets reach this machine alone, and all else is refused.

conftest.py loads it, and puts its folder on PYTHONPATH, where every Python process that a test starts finds
it (Python imports `sitecustomize` at its start). What C++ opens (gloo, torchrun's store) is between ranks.
"""

import errno
import ipaddress
import os
import socket
from typing import Any

_connect, _connect_ex = socket.socket.connect, socket.socket.connect_ex
_sendto, _getaddrinfo = socket.socket.sendto, socket.getaddrinfo


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


def _refuse_unless_here(address: Any) -> None:
    if isinstance(address, tuple) and not _is_here(address[0]):
        if "NETWORK_ATTEMPTS" in os.environ:  # a file: the program may hide the error
            with open(os.environ["NETWORK_ATTEMPTS"], "a") as file:
                file.write(f"{address[0]}\n")
        raise OSError(errno.ENETUNREACH, f"tests run without a network, and this one asks for {address[0]}")


def _checked_connect(self: socket.socket, address: Any) -> None:
    _refuse_unless_here(address)
    _connect(self, address)


def _checked_connect_ex(self: socket.socket, address: Any) -> int:
    _refuse_unless_here(address)
    return _connect_ex(self, address)


def _checked_sendto(self: socket.socket, data: Any, *rest: Any) -> int:
    _refuse_unless_here(rest[-1])
    return _sendto(self, data, *rest)


def _checked_getaddrinfo(host: Any, *rest: Any, **options: Any) -> Any:
    _refuse_unless_here((host,))
    return _getaddrinfo(host, *rest, **options)


socket.socket.connect = _checked_connect  # type: ignore[method-assign]
socket.socket.connect_ex = _checked_connect_ex  # type: ignore[method-assign]
socket.socket.sendto = _checked_sendto  # type: ignore[method-assign, assignment]
socket.getaddrinfo = _checked_getaddrinfo
