"""One exception for everything a user can put right, and the nearest-name hint."""

import difflib
from collections.abc import Iterable
from typing import ClassVar


class JaxherdError(ValueError):
    """Bad input, told in one sentence that names the thing and the remedy.

    The command line prints the message alone and exits with `exit_status`; a traceback from jaxherd
    therefore always means a fault of ours.
    """

    exit_status: ClassVar[int] = 2


class StorageError(JaxherdError):
    """A disk that could not be written: what to mend is outside of the command and may pass.

    Its own exit status (EX_IOERR of sysexits.h) lets a restart loop try again.
    """

    exit_status: ClassVar[int] = 74


class MissingExtraError(JaxherdError, ImportError):
    """An optional package is needed and not installed."""


def missing_extra(package: str, extra: str, purpose: str) -> MissingExtraError:
    """Return the error for an absent optional package, with the command that installs it."""
    return MissingExtraError(
        f"{purpose} needs the package {package!r}: pip install 'jaxherd[{extra}]'."
    )


def nearest(name: str, options: Iterable[str]) -> str:
    """Return a hint such as `did you mean 'mlp'? Choices: ...` for a mistyped `name`."""
    choices = sorted(str(option) for option in options)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    shown = ", ".join(choices[:30]) + (", ..." if len(choices) > 30 else "")
    return f"{hint}Choices: {shown}."
