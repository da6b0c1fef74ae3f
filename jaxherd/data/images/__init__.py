"""Images for models that read them: files, tiles, the tokens that stand for them, frames."""

from jaxherd.data.images.files import Limits, read_image
from jaxherd.data.images.frames import animation_frames, frame_indices, sample_frames
from jaxherd.data.images.layout import ImageTokens, image_length, image_tokens
from jaxherd.data.images.prompt import prepare_images
from jaxherd.data.images.tiles import Tiling, choose_canvas, fitted_size, normalise, tile_image

__all__ = [
    "ImageTokens",
    "Limits",
    "Tiling",
    "animation_frames",
    "choose_canvas",
    "fitted_size",
    "frame_indices",
    "image_length",
    "image_tokens",
    "normalise",
    "prepare_images",
    "read_image",
    "sample_frames",
    "tile_image",
]
