"""Who may open the editing page. Imports nothing that only the page needs."""

from __future__ import annotations

import ipaddress
import re
import secrets
import socket
from dataclasses import dataclass

#: A name or a number, and perhaps a port, as headers have them.
HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]+)(:[0-9]{1,5})?")


@dataclass(frozen=True)
class Access:
    """Who may send requests.

    Attributes:
        names: what a request may call this server, besides numbers; None: anything.
        has_numbers: whether it may be called by any number (an address of an interface).
        token: what a browser must show once; empty: nothing.
    """

    names: frozenset[str] | None = frozenset({"localhost", "127.0.0.1", "::1"})
    has_numbers: bool = False
    token: str = ""

    def is_named(self, host: str) -> bool:
        """Whether a request may use this name for the server (its header `Host`)."""
        match = HOST.fullmatch(host)
        if match is None:
            return False
        name = match[1].strip("[]").lower().removesuffix(".")
        if self.names is None or name in self.names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return self.has_numbers  # no foreign name leads to a page that was opened by a number


def choose_access(host: str, token: str | None) -> Access:
    """Choose who may send requests: only this machine, or everybody with the token.

    Args:
        host: what the server binds.
        token: None: a new one where other machines are served; empty: none.
    """
    try:
        is_local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        is_local = False
    if is_local:
        return Access(frozenset({"localhost", "127.0.0.1", "::1", host}), token=token or "")
    token = secrets.token_urlsafe(24) if token is None else token
    if token:
        # A foreign page gains nothing by another name: a browser shows its cookie to no other name.
        return Access(None, has_numbers=True, token=token)
    return Access(frozenset({"localhost", host.lower(), socket.gethostname().lower()}), has_numbers=True)
