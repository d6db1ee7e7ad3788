"""Who may open the demo page: addresses that it answers to, and the password beyond this machine."""

from __future__ import annotations

import base64
import hmac
import ipaddress
import socket
from dataclasses import dataclass
from urllib.parse import urlsplit

__all__ = ["PASSWORD_VARIABLE", "Access"]

PASSWORD_VARIABLE = "APTVIT_DEMO_PASSWORD"
"""Environment variable with the password, which process listings do not show as they show options."""

_LEAST_LETTERS = 8


@dataclass(frozen=True)
class Access:
    """Who may open the page.

    Attributes:
        host: Address that the server binds to.
        password: Password that browsers ask for, with any user name; None for none.
        without_password: Whether other machines may open the page without a password.

    Raises:
        ValueError: If other machines can open the page, and it is not said whether they need a password; if the
            password is too short.
    """

    host: str = "127.0.0.1"
    password: str | None = None
    without_password: bool = False

    def __post_init__(self) -> None:
        if self.password is not None and self.without_password:
            raise ValueError("a password and --no-password exclude each other; give one of them")
        if self.password is not None and len(self.password) < _LEAST_LETTERS:
            raise ValueError(f"the password has {len(self.password)} letters; give at least {_LEAST_LETTERS}")
        if not (self.is_local or self.password is not None or self.without_password):
            raise ValueError(
                f"with --host {self.host} other machines can open the page; give a password by --password or "
                f"{PASSWORD_VARIABLE}, or --no-password to let everyone in"
            )

    @property
    def is_local(self) -> bool:
        """Whether only this machine can open the page."""
        return _is_loopback(self.host)

    def answers_to(self, host: str) -> bool:
        """Whether a ``Host`` header names this server.

        A page of another site whose name is made to resolve to this machine (DNS rebinding) is of the browser's same
        origin, but sends that site's name. Numeric addresses cannot be rebound.

        Args:
            host: The header, with or without a port.
        """
        try:
            name = urlsplit(f"//{host}").hostname
        except ValueError:
            return False
        if name is None:
            return False
        if _is_loopback(name) or name == self.host.lower():
            return True
        machine = socket.gethostname().lower()
        return not self.is_local and (_is_address(name) or name in (machine, f"{machine}.local"))

    def admits(self, authorization: str) -> bool:
        """Whether an ``Authorization`` header has the password.

        Args:
            authorization: The header, empty if there is none.
        """
        if self.password is None:
            return True
        scheme, _, credentials = authorization.partition(" ")
        try:
            _, _, password = base64.b64decode(credentials, validate=True).partition(b":")
        except ValueError:  # not base64
            return False
        return scheme.lower() == "basic" and hmac.compare_digest(password, self.password.encode())


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_loopback(name: str) -> bool:
    return name.lower() == "localhost" or (_is_address(name) and ipaddress.ip_address(name).is_loopback)
