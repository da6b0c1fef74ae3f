"""Who may ask: the address that the server listens on, API keys, names of hosts."""

import hashlib
import hmac
import ipaddress
import pathlib
import socket
from collections.abc import Iterable, Sequence

from jaxherd.core.errors import JaxherdError
from jaxherd.inference.server.errors import ApiError, unauthorized

_LEAST_KEY = 16
_LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


class Keys:
    """API keys; only their hashes are kept, so that no log or report can show one."""

    def __init__(self, keys: Iterable[str]):
        """Take keys of at least 16 printable ASCII characters.

        Raises:
          JaxherdError: a key is too short to be one, or cannot stand in a header.
        """
        given = [key.strip() for key in keys]
        for key in given:
            if len(key) < _LEAST_KEY or not key.isascii() or not key.isprintable() or " " in key:
                raise JaxherdError(
                    f"an API key must have at least {_LEAST_KEY} printable ASCII characters and "
                    "no spaces: make one with `openssl rand -hex 24`."
                )
        self._hashes = [_hash(key) for key in given]

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def check(self, authorization: str | None) -> None:
        """Raise ApiError (401) unless a header's value is `Bearer` and one of the keys.

        Without keys everybody may ask.  All keys are compared, each in constant time.
        """
        if not self._hashes:
            return
        scheme, _, key = (authorization or "").partition(" ")
        found = _hash(key.strip())
        known = [hmac.compare_digest(found, one) for one in self._hashes]
        if scheme.lower() != "bearer" or not any(known):
            raise unauthorized()


def read_keys(path: pathlib.Path | None, variable: str | None) -> Keys:
    """Return the keys of a file, one a line, or else those of an environment variable's value.

    Raises:
      JaxherdError: the file cannot be read or has no key, or a key is no good.
    """
    if path is None:
        return Keys([variable] if variable else [])
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise JaxherdError(f"cannot read the API keys in {str(path)!r}: {reason}.") from None
    keys = Keys(line for line in lines if line.strip())
    if not keys:
        raise JaxherdError(f"there is no API key in {str(path)!r}: write one a line.")
    return keys


def listen(host: str, port: int, *, has_keys: bool, allow_open: bool) -> socket.socket:
    """Return a bound socket, before anything slow happens.

    Raises:
      JaxherdError: the address is not one of this machine's or is taken; or other machines could
        reach it and there is no API key.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError, OverflowError) as error:
        raise JaxherdError(f"cannot listen on {host!r} port {port}: {error}.") from None
    local = all(is_loopback(address[0]) for *_, address in found)
    if not local and not has_keys and not allow_open:
        raise JaxherdError(
            f"other machines can reach {host!r} and there is no API key: give --api-key-file or "
            "JAXHERD_API_KEY, or --allow-open to serve everybody."
        )
    # A name may have an address of a family that this machine has switched off.
    for family, kind, protocol, _, address in found:
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError as error:
            listener.close()
            reason = error.strerror
        else:
            return listener
    raise JaxherdError(
        f"cannot listen on {host!r} port {port}: {reason}; choose another --port, or 0 for a free "
        "one."
    )


def is_loopback(address: str | int) -> bool:
    """Return whether only this machine can reach an IP address."""
    return ipaddress.ip_address(str(address).partition("%")[0]).is_loopback


class Hosts:
    """The names under which the server answers.

    A web page may make a browser ask this machine under a name of the page's own (DNS rebinding).
    So a server without keys on a loopback address answers to that address's names alone.
    """

    def __init__(self, names: Sequence[str] | None):
        """Answer to these names; None answers to all."""
        self._names = None if names is None else {name.lower() for name in names}

    @classmethod
    def of(cls, listener: socket.socket, *, open: bool, extra: Sequence[str] = ()) -> "Hosts":
        """Return the names for a socket: all if it is `open` or others can reach it anyway."""
        address = str(listener.getsockname()[0])
        if open or not is_loopback(address):
            return cls(None)
        return cls([*_LOCAL_NAMES, address, *extra])

    def check(self, host: str | None) -> None:
        """Raise ApiError (403) unless the request was sent to one of the names."""
        if self._names is None:
            return
        name = (host or "").strip().lower()
        name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
        if name not in self._names:
            raise ApiError(
                403,
                "this server answers to the names of its own machine alone: start it with an API "
                "key, or with --allow-host NAME.",
                code="host_not_allowed",
            )


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
