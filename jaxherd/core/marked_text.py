"""Text between two marker lines of a file that people write: what a command brings up to date."""

from pathlib import Path

from jaxherd.core.errors import JaxherdError


def replaced(text: str, begin: str, end: str, inside: str, *, name: str) -> str:
    """Return the text with what is between the markers replaced.

    Args:
      text: holds both markers, a line each.
      begin, end: the markers.
      inside: what is to stand between them.
      name: of the text, for the error.
    Raises:
      JaxherdError: the markers are not there, once each and in order.
    """
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise JaxherdError(f"{name} needs the two lines {begin!r} and {end!r}, once each.")
    before, rest = text.split(begin)
    after = rest.split(end)[1]
    return f"{before}{begin}\n{inside}\n{end}{after}"


def update(path: Path, begin: str, end: str, inside: str, *, check: bool = False) -> bool:
    """Bring a file up to date; returns whether it had to change.

    Args:
      path: of the file.
      begin, end, inside: see `replaced`.
      check: only look.
    Raises:
      JaxherdError: there is no such file, or it has no such markers.
    """
    if not path.is_file():
        raise JaxherdError(f"{path} does not exist: write it, with the markers {begin} and {end}.")
    old = path.read_text(encoding="utf-8")
    new = replaced(old, begin, end, inside, name=str(path))
    if new != old and not check:
        path.write_text(new, encoding="utf-8")
    return new != old
