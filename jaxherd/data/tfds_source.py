"""TFDS datasets kept as ArrayRecord files, read by random access and without TensorFlow.

`tfds.load`, `as_dataset` and `tf.data` import TensorFlow and are never called here; the builder's
`as_data_source` does not.  Preparing a dataset stays TFDS's own job.
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from jaxherd.core.errors import JaxherdError, nearest

_SPLITS = ("train", "validation", "valid", "test")


@dataclasses.dataclass(frozen=True)
class TfdsName:
    """A parsed `tfds://NAME[/CONFIG][:VERSION][/SPLIT]`."""

    name: str
    config: str | None = None
    version: str | None = None
    split: str | None = None

    @property
    def full_name(self) -> str:
        """Return TFDS's own spelling, `name/config:version`."""
        config = f"/{self.config}" if self.config else ""
        return self.name + config + (f":{self.version}" if self.version else "")


def parse_tfds(source: str) -> TfdsName:
    """Parse a `tfds://` source.

    Without a version, a second part is read as a split if it is one of TFDS's usual split names
    and as a config otherwise.
    """
    text = source.removeprefix("tfds://").strip("/")
    match = re.fullmatch(r"(\w+)((?:/[\w.\-]+)?)(?::(\d+\.\d+\.\d+)(?:/(.+))?|/(.+))?", text)
    if match is None:
        raise JaxherdError(f"Cannot read {source!r}: write tfds://NAME[/CONFIG][:VERSION][/SPLIT].")
    name, config, version, split = match[1], match[2].strip("/"), match[3], match[4] or match[5]
    if version is None and split is None and re.split(r"\[", config)[0] in _SPLITS:
        config, split = "", config
    return TfdsName(name, config or None, version, split)


def dataset_folder(dataset: TfdsName) -> pathlib.Path:
    """Return the prepared folder under `$TFDS_DATA_DIR` or `~/tensorflow_datasets`.

    Without a version the highest one is taken; without a config, the only one.
    """
    root = pathlib.Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    base = root / dataset.name
    if dataset.config:
        base = base / dataset.config
    prepared = [folder.parent for folder in base.glob("*.*.*/dataset_info.json")]
    if not dataset.config and not prepared:
        prepared = [folder.parent for folder in base.glob("*/*.*.*/dataset_info.json")]
        if len({folder.parent for folder in prepared}) > 1:
            configs = [folder.parent.name for folder in prepared]
            raise JaxherdError(
                f"tfds://{dataset.full_name} has several configs: {nearest(dataset.name, configs)}"
            )
    if dataset.version:
        prepared = [folder for folder in prepared if folder.name == dataset.version]
    if not prepared:
        raise JaxherdError(
            f"The TFDS dataset {dataset.full_name!r} is not prepared under {str(root)!r}: run "
            f"`tfds build {dataset.full_name} --file_format=array_record`, or set TFDS_DATA_DIR."
        )
    return max(prepared, key=lambda folder: [int(part) for part in folder.name.split(".")])


class TfdsSource(Sequence[Any]):
    """One split of a prepared TFDS dataset: `len(source)`, `source[i]` -> dict of NumPy values.

    Args:
        folder: the version folder (the one with `dataset_info.json`).
        split: a split name or TFDS slice such as `train[:1%]`.
    """

    def __init__(self, folder: str | os.PathLike[str], split: str):
        self.folder = pathlib.Path(folder)
        self.split = split
        self._open()

    def _open(self) -> None:
        import tensorflow_datasets as tfds

        if not (self.folder / "dataset_info.json").is_file():
            raise JaxherdError(
                f"{str(self.folder)!r} is no prepared TFDS dataset: it has no dataset_info.json."
            )
        builder: Any = tfds.builder_from_directory(self.folder)
        known = list(builder.info.splits)
        base = re.split(r"[\[+]", self.split)[0]
        if base not in known:
            raise JaxherdError(
                f"{builder.info.full_name} has no split {base!r}: {nearest(base, known)}"
            )
        if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
            raise JaxherdError(
                f"{builder.info.full_name} is stored as {builder.info.file_format.value!r}, which "
                "has no random access: prepare it again with --file_format=array_record."
            )
        self.full_name = builder.info.full_name
        self.splits = known
        self._records = builder.as_data_source(split=self.split)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> Any:
        return self._records[index]

    def __getstate__(self) -> dict[str, Any]:
        # Worker processes open the files themselves.
        return {"folder": self.folder, "split": self.split}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()
