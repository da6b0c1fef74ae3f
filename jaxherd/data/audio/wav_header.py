"""What the header of a WAV file promises, which libsndfile corrects in silence.

A WAV file is a list of chunks: four letters, the length in bytes, and as many bytes (filled up to an
even number).  "data" holds the samples.  RF64, for files above 4 GiB, has the true length in "ds64".
"""

import dataclasses
import os
import struct

# Programs that write into a pipe do not know the length yet and leave a large number: ffmpeg all
# ones, sox 0x7ffff000, arecord 2 GiB.
_PLACEHOLDER = 0x7FFF_F000


@dataclasses.dataclass(frozen=True)
class WavLength:
    """Bytes of samples.

    Attributes:
      promised: by the header; None where it stands for "unknown", as in a recorded stream.
      held: by the file.
      per_second: by the header.
    """

    promised: int | None
    held: int
    per_second: int

    @property
    def is_cut(self) -> bool:
        """Whether the file ends before what its header promises."""
        return self.promised is not None and self.held < self.promised

    @property
    def seconds(self) -> float:
        """What the header promises; 0 where it does not."""
        return (self.promised or 0) / max(self.per_second, 1)


def wav_length(path: str | os.PathLike[str]) -> WavLength | None:
    """Return what the header of a WAV or RF64 file says; None if it has no chunk of samples."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        kind = file.read(12)[:4]
        order = ">" if kind == b"RIFX" else "<"
        per_second, long_length = 0, None
        while len(head := file.read(8)) == 8:
            name, length = struct.unpack(f"{order}4sI", head)
            start = file.tell()
            if name == b"data":
                promised: int | None = length
                if kind == b"RF64" and length == 0xFFFF_FFFF:
                    promised = long_length
                elif length >= _PLACEHOLDER and size - start < length:
                    promised = None
                return WavLength(promised, size - start, per_second)
            if name == b"fmt " and length >= 16:
                per_second = struct.unpack(f"{order}8xI4x", file.read(16))[0]
            elif name == b"ds64" and length >= 16:
                long_length = struct.unpack("<8xQ", file.read(16))[0]
            file.seek(start + length + length % 2)
    return None
