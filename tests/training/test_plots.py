"""Figures are drawn without a window system."""

import numpy as np
from matplotlib.image import imread

from jaxherd.training.plots import seed_curves


def test_panels_stand_side_by_side(tmp_path):
    panel = {
        "x": [1, 2, 4],
        "series": {"a": [[0.0, 1.0, 2.0], [1.0, 1.0, 1.0]], "b": [[2.0, 1.0, 0.0]]},
        "x_label": "x",
        "y_label": "y",
        "title": "t",
    }
    marked = panel | {"log_x": True, "limits": (0, 3), "lines": {"zero": 0.0}}
    one, two = tmp_path / "new" / "one.png", tmp_path / "two.png"
    seed_curves(one, [panel])
    seed_curves(two, [panel, marked])
    assert imread(two).shape[1] > 1.5 * imread(one).shape[1]
    # Something is drawn in either half.
    picture = imread(two)[..., :3]
    assert all(np.std(half) > 0.02 for half in np.array_split(picture, 2, axis=1))
