"""Addresses and keys."""

import contextlib
import socket

import pytest

from jaxherd.core.errors import JaxherdError
from jaxherd.inference.server.access import Hosts, Keys, listen, read_keys
from jaxherd.inference.server.errors import ApiError

KEY = "0123456789abcdef-key"


def test_other_machines_need_a_key():
    for host in ("0.0.0.0", "::"):
        with pytest.raises(JaxherdError, match="other machines can reach"):
            listen(host, 0, has_keys=False, allow_open=False)
    for options in (
        {"has_keys": True, "allow_open": False},
        {"has_keys": False, "allow_open": True},
    ):
        with contextlib.closing(listen("0.0.0.0", 0, **options)) as listener:
            assert listener.getsockname()[0] == "0.0.0.0"
    for host in ("127.0.0.1", "localhost", "127.1.2.3"):
        with contextlib.closing(listen(host, 0, has_keys=False, allow_open=False)) as listener:
            assert listener.getsockname()[1] > 0


def test_addresses_that_cannot_be():
    with contextlib.closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(JaxherdError, match=f"port {port}: Address already in use"):
            listen("127.0.0.1", port, has_keys=False, allow_open=False)
    with pytest.raises(JaxherdError, match="cannot listen on 'no such host'"):
        listen("no such host", 0, has_keys=True, allow_open=False)
    with pytest.raises(JaxherdError, match="cannot listen on"):
        listen("192.0.2.1", 0, has_keys=True, allow_open=False)


def test_keys_of_a_file_or_a_variable(tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"\n{KEY}\n  another-long-enough-key \n\n")
    keys = read_keys(path, "not-this-one-but-long")
    for key in (KEY, "another-long-enough-key"):
        keys.check(f"Bearer {key}")
        keys.check(f"bearer  {key} ")
    for header in (None, "", KEY, f"Bearer {KEY}x", "Bearer not-this-one-but-long", f"Basic {KEY}"):
        with pytest.raises(ApiError) as caught:
            keys.check(header)
        assert caught.value.status == 401
    read_keys(None, KEY).check(f"Bearer {KEY}")
    assert not read_keys(None, None) and not read_keys(None, "")
    read_keys(None, None).check(None)
    assert KEY not in repr(vars(keys)) and KEY not in repr(keys)


def test_keys_that_are_none(tmp_path):
    empty = tmp_path / "empty"
    empty.write_text("\n \n")
    for path, words in [(empty, "no API key in"), (tmp_path / "absent", "No such file"),
                        (tmp_path, "directory")]:  # fmt: skip
        with pytest.raises(JaxherdError, match=words):
            read_keys(path, None)
    for bad in ("short", "with a space in between", "ümlaute-ümlaute-ümlaute"):
        with pytest.raises(JaxherdError, match="at least 16 printable") as caught:
            Keys([bad])
        assert bad not in str(caught.value)


def test_names_of_hosts():
    with contextlib.closing(listen("127.0.0.1", 0, has_keys=False, allow_open=False)) as listener:
        hosts = Hosts.of(listener, open=False, extra=("My-Proxy.test",))
        for name in ("localhost", "127.0.0.1:80", "[::1]:80", "[::1]", "my-proxy.test:1"):
            hosts.check(name)
        for name in (None, "", "evil.test", "localhost.evil.test", "127.0.0.1.evil.test:80"):
            with pytest.raises(ApiError, match="names of its own machine"):
                hosts.check(name)
        Hosts.of(listener, open=True).check("evil.test")
    with contextlib.closing(listen("0.0.0.0", 0, has_keys=True, allow_open=False)) as listener:
        Hosts.of(listener, open=False).check("any.test")
