"""Run musicnn on a synthetic wave and write what it says.

    python tests/golden/make_musicnn_goldens.py

Needs musicnn 0.1.0 (`pip install --no-deps`, as it asks for NumPy below 1.17), tensorflow-cpu, tf_keras
and librosa; 2.21, 2.21 and 0.11 made the committed files.  The package's spectrogram is computed by
librosa as it was when the networks were trained (reflected edges), and not rounded to float16.
"""

import functools
import os
import pathlib
import sys
import tempfile

os.environ["TF_USE_LEGACY_KERAS"] = "1"

import librosa
import musicnn.extractor as package
import numpy as np
import soundfile

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE))
from random_weights import plucked  # noqa: E402


class WithoutRounding:
    """The package's NumPy but for float16."""

    float16 = np.float32

    def __getattr__(self, name):
        return getattr(np, name)


def main():
    package.np = WithoutRounding()
    package.config.BATCH_SIZE = 16  # from the second batch on it repeats the first one's features
    package.librosa.feature.melspectrogram = functools.partial(
        librosa.feature.melspectrogram, pad_mode="reflect"
    )
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "a.wav")
        soundfile.write(path, plucked(), 16_000, subtype="FLOAT")
        bands, _ = package.batch_data(path, 187, 187)
        for name in ("MTT_musicnn", "MSD_musicnn"):
            tags, labels, found = package.extractor(path, name)
            arrays = {"tags": tags, "features": found["penultimate"], "bands": bands[:, ::16]}
            np.savez_compressed(HERE / f"{name.lower()}.npz", **arrays)
            order = np.argsort(-tags.mean(axis=0))[:5]
            print(
                name, tags.shape, [(labels[i], round(float(tags[:, i].mean()), 3)) for i in order]
            )


if __name__ == "__main__":
    main()
