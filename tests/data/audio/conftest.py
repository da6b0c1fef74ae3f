import numpy as np
import pytest

from jaxherd.data.audio.files import write_audio
from jaxherd.data.audio.tracks import AudioGroup

RATE = 4000


@pytest.fixture(scope="module")
def groups(tmp_path_factory) -> tuple[AudioGroup, ...]:
    """Two groups of four short recordings: tones whose pitch tells the track, and noise."""
    root = tmp_path_factory.mktemp("recordings")
    chance = np.random.default_rng(0)
    for number in range(4):
        t = np.arange(RATE * 3) / RATE
        wave = 0.4 * np.sin(2 * np.pi * (200 + 100 * number) * t)
        for name, data in (("tone", wave), ("hiss", 0.1 * chance.standard_normal(len(t)))):
            folder = root / name
            folder.mkdir(exist_ok=True)
            write_audio(folder / f"{number}.wav", np.stack([data, data], 1).astype("f4"), RATE)
    (root / "tone" / "1.txt").write_text("a low tone\n")
    return tuple(AudioGroup(name, (str(root / name),)) for name in ("tone", "hiss"))
