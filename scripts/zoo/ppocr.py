"""PP-OCRv6 small text recogniser: raw ONNX file out of rapidocr's wheel, scored on rendered text lines."""

from __future__ import annotations

import functools
import io
from pathlib import Path

import numpy as np
import onnx
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from zoo import fetch
from zoo.task import Run, Task, mean_of

NAME = "ppocrv6"
HEIGHT, WIDTH = 48, 320
SEED = 6061
LINES = 4000
FACES = [
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
]


SERIAL = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-"
LOST_RESOLUTION = (2.0, 3.7)
BLUR = (0.4, 1.0)
CONTRAST = (0.3, 0.8)
NOISE = (3.0, 14.0)
QUALITY = (20, 60)


def onnx_path() -> Path:
    """Path of the raw file: dynamic batch and width, 18,710 classes."""
    return fetch.extracted("rapidocr", "rapidocr/models/PP-OCRv6_rec_small.onnx")


def input_shapes() -> dict[str, tuple[int, ...]]:
    """One line, 48 pixels high and 320 wide, padded on the right."""
    return {"x": (1, 3, HEIGHT, WIDTH)}


@functools.cache
def characters() -> list[str]:
    """Class names: CTC's blank, the characters of the file's metadata, space."""
    metadata = {p.key: p.value for p in onnx.load(onnx_path(), load_external_data=False).metadata_props}
    return ["", *metadata["character"].splitlines(), " "]


def decode(probabilities: np.ndarray) -> str:
    """Greedy CTC: best class of each step, repeats and blanks taken out. `probabilities` is ``(steps, classes)``."""
    best = probabilities.argmax(axis=1)
    keep = (best != 0) & np.concatenate([[True], best[1:] != best[:-1]])
    return "".join(characters()[c] for c in best[keep])


@functools.cache
def _words() -> list[str]:
    return (Path(__file__).parent / "words.txt").read_text().split()


@functools.cache
def _font(face: str, size: int) -> ImageFont.FreeTypeFont:
    data = fetch.read("matplotlib", f"matplotlib/mpl-data/fonts/ttf/{face}.ttf")
    return ImageFont.truetype(io.BytesIO(data), size, layout_engine=ImageFont.Layout.BASIC)


def _text(rng: np.random.RandomState) -> str:
    """Two or three tokens, at most 22 characters: words in some case, numbers, prices, serials, dates."""
    tokens = []
    for _ in range(rng.randint(2, 4)):
        kind = rng.rand()
        word = _words()[rng.randint(len(_words()))]
        if kind < 0.35:
            tokens.append(word)
        elif kind < 0.6:
            tokens.append(word.capitalize())
        elif kind < 0.7:
            tokens.append(word.upper())
        elif kind < 0.85:
            tokens.append(str(rng.randint(1, 10 ** rng.randint(2, 6))))
        elif kind < 0.90:
            tokens.append(f"{rng.randint(1, 1000)}.{rng.randint(100):02d}")
        elif kind < 0.95:
            tokens.append("".join(SERIAL[k] for k in rng.randint(len(SERIAL), size=rng.randint(4, 8))))
        else:
            tokens.append(f"{rng.randint(1, 29):02d}/{rng.randint(1, 13):02d}/{rng.randint(1990, 2027)}")
    line = " ".join(tokens)
    return line if len(line) <= 22 else " ".join(tokens[:2])[:22].rstrip()


def _render(text: str, rng: np.random.RandomState) -> Image.Image:
    """Dark text on a light ground, RGB, 64 pixels high or so."""
    font = _font(FACES[rng.randint(len(FACES))], 44)
    left, top, right, bottom = font.getbbox(text)
    margin = rng.randint(4, 12)
    ground = rng.randint(215, 256, 3)
    ink = rng.randint(0, 90, 3)
    image = Image.new(
        "RGB", (int(right - left) + 4 * margin, int(bottom - top) + 2 * margin), tuple(map(int, ground))
    )
    ImageDraw.Draw(image).text((2 * margin - left, margin - top), text, font=font, fill=tuple(map(int, ink)))
    return image


def _distort(image: Image.Image, rng: np.random.RandomState) -> Image.Image:
    """Tilt, perspective, lost resolution, blur, weak contrast, noise, JPEG: a bad phone photo of the line."""
    width, height = image.size
    ground = image.getpixel((0, 0))
    angle = float(rng.uniform(-3, 3))
    image = image.rotate(angle, Image.Resampling.BICUBIC, expand=True, fillcolor=ground)
    width, height = image.size
    shift = rng.uniform(0, 0.09, 8) * np.array([height * 2, height] * 4)
    corners = (0, 0, 0, height, width, height, width, 0)
    inward = np.array([1, 1, 1, -1, -1, -1, -1, 1])
    image = image.transform(
        (width, height),
        Image.Transform.QUAD,
        tuple(corners - inward * shift),
        Image.Resampling.BICUBIC,
        fillcolor=ground,
    )
    factor = float(rng.uniform(*LOST_RESOLUTION))
    image = image.resize(
        (max(8, round(width / factor)), max(8, round(height / factor))), Image.Resampling.BILINEAR
    )
    image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(*BLUR))))
    pixels = np.asarray(image, np.float32)
    contrast = rng.uniform(*CONTRAST)
    pixels = (pixels - 128) * contrast + 128 + rng.uniform(-30, 30)
    pixels += rng.normal(0, rng.uniform(*NOISE), pixels.shape)
    image = Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=int(rng.randint(*QUALITY)))
    return Image.open(io.BytesIO(stream.getvalue())).convert("RGB")


def preprocess(image: Image.Image) -> dict[str, np.ndarray]:
    """As the recogniser was trained: height 48, BGR, ``v / 127.5 - 1``, zeros to the right; ``(1, 3, 48, 320)``."""
    width = min(WIDTH, max(1, -(-image.width * HEIGHT // image.height)))
    pixels = np.asarray(image.resize((width, HEIGHT), Image.Resampling.BILINEAR), np.float32)[:, :, ::-1]
    padded = np.zeros((1, 3, HEIGHT, WIDTH), np.float32)
    padded[0, :, :, :width] = (pixels / 127.5 - 1).transpose(2, 0, 1)
    return {"x": padded}


def line(condition: str, i: int, seed: int = SEED) -> tuple[Image.Image, str]:
    """Line `i` of "clean" or "distorted": picture and text. Both conditions show the same text in the same face."""
    rng = np.random.RandomState([seed, i])
    text = _text(rng)
    image = _render(text, rng)
    return (_distort(image, rng) if condition == "distorted" else image), text


def calibration(n: int) -> list[dict[str, np.ndarray]]:
    """Lines of another seed, clean and distorted in turn."""
    return [preprocess(line(("clean", "distorted")[i % 2], i, SEED + 1)[0]) for i in range(n)]


def probes(quick: bool = False) -> list[dict[str, np.ndarray]]:
    """The first distorted lines."""
    return [preprocess(line("distorted", i)[0]) for i in range(16 if quick else 64)]


def tasks(quick: bool = False) -> list[Task]:
    """Line accuracy: the share of lines read without any mistake."""
    count = 100 if quick else LINES

    def hits(condition: str, run: Run) -> np.ndarray:
        found = []
        for i in range(count):
            image, text = line(condition, i)
            found.append(decode(run(preprocess(image))[0][0]) == text)
        return np.array(found)

    return [
        Task(condition, "line accuracy", count, functools.partial(hits, condition), mean_of)
        for condition in ("clean", "distorted")
    ]
