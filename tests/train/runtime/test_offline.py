"""The tests run without a network (offline/sitecustomize.py): in this process and in those that it starts."""

import socket
import subprocess
import sys

import pytest

# 192.0.2.0/24 is for documentation (RFC 5737): where the block fails, nobody answers.
OUTSIDE = ("192.0.2.1", 80)


@pytest.mark.parametrize(
    "ask",
    [
        lambda: socket.create_connection(OUTSIDE, timeout=2),
        lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"?", OUTSIDE),
        lambda: socket.socket().connect_ex(OUTSIDE),
        lambda: socket.getaddrinfo("example.com", 443),
    ],
    ids=["connect", "sendto", "connect_ex", "name"],
)
def test_a_test_that_asks_for_the_network_fails(ask):
    with pytest.raises(OSError, match="tests run without a network"):
        ask()


def test_only_this_machine_is_reached_also_by_a_process_that_a_test_starts():
    code = f"import socket; socket.create_connection({OUTSIDE}, timeout=2)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "tests run without a network, and this one asks for 192.0.2.1" in run.stderr
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        pass
