"""Who may open the demo page."""

from __future__ import annotations

import base64
import socket

import pytest

from aptvit.demo.access import Access


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "example.org", ""])
def test_other_machines_need_a_decision(host: str) -> None:
    with pytest.raises(ValueError, match=r"other machines can open the page; give a password .* or --no-password"):
        Access(host)
    assert not Access(host, "long enough").is_local and not Access(host, without_password=True).is_local


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "localhost", "::1"])
def test_this_machine_needs_none(host: str) -> None:
    assert Access(host).is_local and Access(host).admits("")


def test_passwords_that_do_not_help() -> None:
    with pytest.raises(ValueError, match="has 7 letters; give at least 8"):
        Access("0.0.0.0", "1234567")
    with pytest.raises(ValueError, match="exclude each other"):
        Access("0.0.0.0", "long enough", without_password=True)


def test_passwords() -> None:
    access = Access(password="pass:wörd")

    def header(text: str) -> str:
        return f"Basic {base64.b64encode(text.encode()).decode()}"

    assert access.admits(header("anybody:pass:wörd")) and access.admits(header(":pass:wörd"))
    for wrong in ("", "Basic", "Basic ?", header("pass:wörd"), header("a:pass"), "Bearer pass:wörd", header("a")):
        assert not access.admits(wrong)


def test_names_that_are_answered() -> None:
    machine = socket.gethostname()
    local, open_to_all = Access(), Access("0.0.0.0", without_password=True)
    for name in ("localhost:7860", "127.0.0.1", "[::1]:80", "LOCALHOST"):
        assert local.answers_to(name) and open_to_all.answers_to(name)
    for name in ("192.168.1.5:7860", "[fe80::1]", machine, f"{machine}.local:7860"):
        assert not local.answers_to(name) and open_to_all.answers_to(name)
    for name in ("evil.example", "127.0.0.1.evil.example", "", "[", "localhost.evil.example:7860", "x@evil.example"):
        assert not local.answers_to(name) and not open_to_all.answers_to(name)
    assert Access("demo.example.org", "long enough").answers_to("demo.example.org:7860")
