"""Where a server listens: the values of `--host` and `--port`, and the socket."""

import argparse
import ipaddress
import os
import socket


def port(text: str) -> int:
    """A TCP port, for argparse."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"a port is a whole number of 0 to 65535, got {text!r}")
    return int(text)


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own. Of names, only localhost."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there.

    Raises:
        OSError: the port is taken, or the address is not this machine's; says what to do.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        what = os.strerror(error.errno) if isinstance(error.errno, int) and error.errno > 0 else str(error)
        raise OSError(
            f"cannot listen at --host {host} --port {port}: {what}; give another --port, or 0 for a free one"
        ) from None
