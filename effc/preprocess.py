"""From stored samples to what a model is fed: layout, resize, crop, scale, mean, std, dtype."""

from __future__ import annotations

import numpy as np
from PIL import Image

from effc.dataspec import InputSpec
from effc.errors import BadInput
from effc.model import TensorInfo


def prepare(raw: np.ndarray | list[np.ndarray], how: InputSpec, where: str) -> np.ndarray:
    """Stored samples -> (crop(resize(x)) / scale - mean) / std; images as [N, C, H, W]."""
    layout = how.layout or "NCHW"
    if isinstance(raw, list):  # decoded files, [H, W, C] each, of any size
        if how.layout in ("NCHW", "NHW"):
            raise BadInput(f"{where}: images from files are NHWC, not {how.layout}: leave layout out")
        layout, image = "NHWC", True
    else:
        image = raw.ndim == len(layout)
    if image:
        if not isinstance(raw, list):
            raw = raw[..., None] if layout == "NHW" else raw.transpose(0, 2, 3, 1) if layout == "NCHW" else raw
        if how.resize is not None or how.crop is not None:
            raw = [_crop(_resize(sample, how.resize), how.crop, where) for sample in raw]
        raw = _stack(raw, where).transpose(0, 3, 1, 2)
    array = np.asarray(raw)
    if array.dtype.kind not in "biuf":
        raise BadInput(f"{where}: the array is of type {array.dtype}: allowed are numbers and booleans")
    if how.scale is None and how.mean is None and how.std is None:
        return np.ascontiguousarray(array)
    array = array.astype(np.float64 if array.dtype == np.float64 else np.float32, order="C")
    for key, apply in (("scale", np.divide), ("mean", np.subtract), ("std", np.divide)):
        if (number := getattr(how, key)) is not None:
            apply(array, _per_channel(number, array, image, f"{where}: {key}"), out=array)
    return array


def _stack(images: np.ndarray | list[np.ndarray], where: str) -> np.ndarray:
    if isinstance(images, np.ndarray):
        return images
    sizes = {image.shape[:2] for image in images}
    if len(sizes) > 1:
        raise BadInput(f"{where}: images differ in size, such as {sorted(sizes)[:2]}: give resize and crop")
    return np.stack(images)


def _per_channel(number: float | tuple[float, ...], array: np.ndarray, image: bool, where: str) -> np.ndarray:
    vector = np.asarray(number, array.dtype)
    if vector.size == 1:
        return vector.reshape(())
    axis = 1 if image else array.ndim - 1
    if array.ndim < 2 or array.shape[axis] != vector.size:
        channels = array.shape[axis] if array.ndim > 1 else 1
        raise BadInput(f"{where} has {vector.size} numbers, the samples {channels} channels: give one or {channels}")
    return vector.reshape([-1 if i == axis else 1 for i in range(array.ndim)])


def _resize(image: np.ndarray, side: int | tuple[int, int] | None) -> np.ndarray:
    """[H, W, C] -> [h, w, C], bilinear as Pillow does it (antialiased); uint8 stays uint8."""
    if side is None:
        return image
    height, width = image.shape[:2]
    if isinstance(side, int):
        short = min(height, width)
        size = side * height // short, side * width // short
    else:
        size = side
    if size == (height, width):
        return image
    plain = image if image.dtype == np.uint8 else image.astype(np.float32)
    channels = [Image.fromarray(channel) for channel in np.moveaxis(plain, 2, 0)]
    return np.stack([np.asarray(c.resize((size[1], size[0]), Image.Resampling.BILINEAR)) for c in channels], axis=2)


def _crop(image: np.ndarray, side: int | tuple[int, int] | None, where: str) -> np.ndarray:
    if side is None:
        return image
    height, width = (side, side) if isinstance(side, int) else side
    top, left = image.shape[0] - height, image.shape[1] - width
    if top < 0 or left < 0:
        raise BadInput(f"{where}: crop {height} x {width} of images {image.shape[0]} x {image.shape[1]}: resize first")
    top, left = round(top / 2), round(left / 2)
    return image[top : top + height, left : left + width]


def cast(array: np.ndarray, info: TensorInfo, where: str) -> np.ndarray:
    """To the dtype of the model's input, where no value can lose its meaning."""
    found, taken = array.dtype, info.dtype
    if found == taken:
        return array
    to_float = taken.kind == "f" or taken.name.startswith(("bfloat", "float"))  # ml_dtypes have kind V
    if not to_float and (found.kind == "f" or taken.kind not in "iu"):
        raise BadInput(f"{where}: the data are {found}, the model's input takes {taken}: cast them with dtype: {taken}")
    if taken.kind in "iu" and found.kind in "iu" and array.size:
        low, high = int(array.min()), int(array.max())
        if low < np.iinfo(taken).min or high > np.iinfo(taken).max:
            raise BadInput(f"{where}: values from {low} to {high} do not fit {taken}, which the model's input takes")
    with np.errstate(over="ignore"):  # infinity is looked for afterwards
        return array.astype(taken)
