"""Several lengths in one module: each input runs at the next length, with one set of weights."""

import platform
from itertools import pairwise

import numpy as np
import pytest
import typer
from models import WIDTH, encoder, model, tokens
from onnx import helper

import tvm_qfp8 as q
from tvm_qfp8.cli.options import parse_shapes
from tvm_qfp8.errors import CalibrationError, InputError, ModelError
from tvm_qfp8.runtime import LOADED

LENGTHS = [8, 12, 20]


def shapes(extent, batch=1):
    return {"ids": (batch, extent), "mask": (batch, extent)}


CALIBRATION = [tokens(20, seed) for seed in range(4)]


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    made = q.compile(encoder(), input_shapes=shapes(LENGTHS), calibration=CALIBRATION)
    path = tmp_path_factory.mktemp("lengths") / "encoder.so"
    made.export_library(path)
    return q.load(path)


@pytest.mark.parametrize("length", LENGTHS)
def test_at_its_length_an_input_is_not_padded(module, length):
    alone = q.compile(encoder(), input_shapes=shapes(20), calibration=CALIBRATION)
    # The same codes and scales: what a module of the longest gives to a padded input.
    given = tokens(length, seed=7)
    padded = {name: np.pad(array, ((0, 0), (0, 20 - length))) for name, array in given.items()}
    (found,) = module.run(given)
    assert found.shape == (1, length, WIDTH)
    np.testing.assert_array_equal(found, alone.run(padded)[0][:, :length])


@pytest.mark.parametrize("length", [1, 5, 9, 13, 19])
def test_between_lengths_padding_changes_no_bit(module, length):
    given = tokens(length, seed=3)
    (found,) = module.run(given)
    longer = {name: np.pad(array, ((0, 0), (0, 20 - length))) for name, array in given.items()}
    assert found.flags["C_CONTIGUOUS"]
    np.testing.assert_array_equal(found, module.run(longer)[0][:, :length])


def test_weights_are_held_once(module):
    alone = q.compile(encoder(), input_shapes=shapes(20), calibration=CALIBRATION)
    key = "resident bytes of constants after load"
    # Embeddings of places are the only constants whose shape depends on the length.
    more = int(module.report.totals[key]) - int(alone.report.totals[key])
    assert more <= 4 * WIDTH * (8 + 12)
    assert "lengths 8, 12, 20" in " ".join(module.report.notes)


@pytest.mark.parametrize(
    "target", ["x86-64-v3", "x86-64-v4", "llvm -mtriple=aarch64-linux-gnu -mcpu=neoverse-n2"]
)
def test_tiles_of_every_length_read_the_same_packed_weights(target):
    nodes = [helper.make_node("Abs", ["x"], ["a"]), helper.make_node("MatMul", ["a", "w"], ["y"])]
    weight = np.random.default_rng(0).standard_normal((160, 200)).astype(np.float32)
    made = model(nodes, {"x": (1, "n", 160)}, {"y": (1, "n", 200)}, {"w": weight})
    key = "resident bytes of constants after load"
    alone, several = (
        int(q.compile(made, target, input_shapes={"x": (1, lengths, 160)}).report.totals[key])
        for lengths in ([33], [8, 12, 20, 28, 33])
    )
    assert several - alone < weight.size // 10


@pytest.mark.slow
def test_shorter_samples_calibrate_like_padded_ones_however_they_are_given(tmp_path):
    short = [tokens(13, seed) for seed in range(4)]
    padded = [{name: np.pad(array, ((0, 0), (0, 7))) for name, array in one.items()} for one in short]
    stacked = {name: np.concatenate([one[name] for one in short]) for name in ("ids", "mask")}
    np.savez(tmp_path / "short.npz", **{name: array[:, None] for name, array in stacked.items()})
    given = tokens(11, seed=5)
    expected, *found = (
        q.compile(encoder(), input_shapes=shapes(LENGTHS), calibration=samples).run(given)[0]
        for samples in (padded, short, stacked, tmp_path / "short.npz")
    )
    for one in found:
        np.testing.assert_array_equal(one, expected)


def test_where_the_trial_reads_outside_a_table_nothing_is_padded():
    """A table of one row, as of token types where there is one: random indices of 0 and 1 say nothing."""
    made = encoder(words=1)
    compiled = q.compile(made, input_shapes=shapes([4, 8]))
    given = {"ids": np.zeros((1, 4), np.int64), "mask": np.ones((1, 4), np.int64)}
    assert compiled.run(given)[0].shape == (1, 4, WIDTH)
    with pytest.raises(InputError, match="padding them may change"):
        compiled.run({name: array[:, :3] for name, array in given.items()})


def test_without_calibration_and_with_an_open_batch():
    made = q.compile(encoder(), input_shapes=shapes([4, 9], batch="n"))
    given = [tokens(6, seed) for seed in range(3)]
    stacked = {name: np.concatenate([one[name] for one in given]) for name in ("ids", "mask")}
    (found,) = made.run(stacked)
    assert found.shape == (3, 6, WIDTH)
    np.testing.assert_array_equal(found, np.concatenate([made.run(one)[0] for one in given]))
    none = {name: array[:0] for name, array in stacked.items()}
    assert made.run(none)[0].shape == (0, 6, WIDTH)


def test_an_input_that_no_program_fits_is_named(module):
    for length in (0, 21):
        with pytest.raises(InputError, match=f"length {length}, the module is compiled for 8, 12, 20"):
            module.run({name: np.zeros((1, length), np.int64) for name in ("ids", "mask")})
    with pytest.raises(InputError, match="8 in 'ids', 9 in 'mask'"):
        module.run({"ids": tokens(8)["ids"], "mask": tokens(9)["mask"]})
    with pytest.raises(InputError, match="dtype int32"):
        module.run({name: array.astype(np.int32) for name, array in tokens(8).items()})
    with pytest.raises(InputError, match=r"shape \(8,\)"):
        module.run({name: array[0] for name, array in tokens(8).items()})


def test_where_padding_shows_only_the_lengths_themselves_run():
    def words(length):
        return {"ids": tokens(length)["ids"]}

    given = {"ids": (1, [8, 12])}
    unmasked = q.compile(encoder(masked=False), input_shapes=given)
    assert unmasked.run(words(8))[0].shape == (1, 8, WIDTH)
    with pytest.raises(InputError, match="length 9.*8, 12.*padding them may change"):
        unmasked.run(words(9))
    with pytest.raises(CalibrationError, match=r"found shape \(1, 9\), expected \(1, 12\)"):
        q.compile(encoder(masked=False), input_shapes=given, calibration=[words(9)])


@pytest.mark.skipif(platform.machine() != "x86_64", reason="runs code for x86-64")
def test_a_convolution_of_several_widths():
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((16, 3, 3, 3)).astype(np.float32)
    constants = {"w": weight, "w2": rng.standard_normal((16, 16, 3, 3)).astype(np.float32)}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Conv", ["r", "w2"], ["y"], pads=[1, 1, 1, 1]),
    ]
    made = model(nodes, {"x": (1, 3, 8, "width")}, {"y": (1, 16, 4, "half")}, constants)
    images = [{"x": rng.standard_normal((1, 3, 8, 32)).astype(np.float32)} for _ in range(4)]
    compiled, alone = (
        q.compile(made, "x86-64", input_shapes={"x": (1, 3, 8, width)}, calibration=images)
        for width in (range(16, 33, 16), 32)
    )
    np.testing.assert_array_equal(compiled.run(images[0])[0], alone.run(images[0])[0])
    # The filters that Winograd's algorithm transforms are held once, too.
    assert compiled.report.totals[LOADED].split()[0] == alone.report.totals[LOADED].split()[0]
    left = {"x": images[0]["x"][..., :16]}
    (found,) = compiled.run(left)
    assert found.shape == (1, 16, 4, 8)
    # Away from the edge the convolution sees the same pixels.
    np.testing.assert_array_equal(found[..., :6], alone.run(images[0])[0][..., :6])
    with pytest.raises(InputError, match="padding them may change"):
        compiled.run({"x": images[0]["x"][..., :20]})


@pytest.mark.parametrize(
    "given, message",
    [
        (shapes([]), "positive integers"),
        (shapes([0, 4]), "positive integers"),
        ({"ids": (1, [4, 8]), "mask": (1, [4, 9])}, r"different lengths, \[4, 8\] and \[4, 9\]"),
        ({"ids": ([1, 2], [4, 8]), "mask": (1, 8)}, "one dimension"),
        (shapes("tokens"), r"for another give the lengths .*lengths_up_to\(128\)"),
    ],
)
def test_lengths_that_make_no_sense_are_named(given, message):
    with pytest.raises(ModelError, match=message):
        q.compile(encoder(), input_shapes=given)


def test_another_network_at_another_length_is_refused():
    node = helper.make_node
    nodes = [
        node("Shape", ["x"], ["n"], start=1, end=2),
        node("Slice", ["table", "zero", "n", "zero"], ["w"]),
        node("MatMul", ["x", "w"], ["y"]),
    ]
    constants = {
        "zero": np.array([0], np.int64),
        "table": np.random.default_rng(0).standard_normal((9, 5)).astype(np.float32),
    }
    made = model(nodes, {"x": (1, "n")}, {"y": (1, 5)}, constants)
    with pytest.raises(ModelError, match="another network at length 4"):
        q.compile(made, input_shapes={"x": (1, [4, 9])})


def test_command_line_lengths():
    assert parse_shapes(["ids=1,8/12/20"]) == {"ids": (1, [8, 12, 20])}
    assert parse_shapes(["ids=N,8/12"]) == {"ids": ("N", [8, 12])}
    assert parse_shapes(["ids=1,..32,3"]) == {"ids": (1, [8, 12, 16, 20, 24, 28, 32], 3)}
    for wrong in ("ids=1,../8", "ids=1,..8/12", "ids=1,0/8", "ids=1,..0", "ids=1,.8", "ids=1,8..16"):
        with pytest.raises(typer.BadParameter, match="NAME=EXTENT"):
            parse_shapes([wrong])


@pytest.mark.parametrize("longest", [1, 3, 4, 5, 31, 32, 33, 100, 128, 512, 1000])
def test_lengths_up_to_one_waste_little(longest):
    lengths = q.lengths_up_to(longest)
    assert lengths[-1] == longest
    assert lengths == sorted(set(lengths))
    assert lengths[0] <= 8 and all(
        after - before <= max(4, before / 4) for before, after in pairwise(lengths)
    )


def test_lengths_up_to_nothing_are_refused():
    with pytest.raises(ModelError, match="the longest input has 0"):
        q.lengths_up_to(0)


def test_an_exported_program_with_an_open_dimension():
    torch = pytest.importorskip("torch", reason="torch is an extra")

    class Shifted(torch.nn.Module):
        def forward(self, x):
            # The slice ends at n + 1, which has to become a number.
            return torch.cat([x[:, :1], x], 1)[..., 1:] * 2

    rows = torch.export.Dim("n", min=2, max=16)
    exported = torch.export.export(Shifted(), (torch.zeros(1, 4),), dynamic_shapes=({1: rows},))
    compiled = q.compile(exported, input_shapes={"x": (1, [4, 7])})
    for length in (3, 4, 6, 7):
        x = np.arange(length, dtype=np.float32)[None]
        np.testing.assert_array_equal(compiled.run({"x": x})[0], 2 * x)


def test_a_recurrent_layer_runs_as_many_steps_as_its_input_has():
    rng = np.random.default_rng(0)
    shapes_of_weights = {"w": (1, 24, 6), "r": (1, 24, 8), "b": (1, 48)}
    constants = {
        name: rng.standard_normal(shape).astype(np.float32) / 3 for name, shape in shapes_of_weights.items()
    }
    nodes = [helper.make_node("GRU", ["x", "w", "r", "b"], ["y", "last"], hidden_size=8)]
    outputs = {"y": ("steps", 1, 1, 8)}
    made = model(nodes, {"x": ("steps", 1, 6)}, outputs, constants)
    compiled = q.compile(made, input_shapes={"x": ([3, 7], 1, 6)})
    alone = q.compile(made, input_shapes={"x": (7, 1, 6)})
    x = rng.standard_normal((7, 1, 6)).astype(np.float32)
    for steps in (2, 3, 5, 7):  # an output does not see what comes after its step
        (found,) = compiled.run({"x": x[:steps]})
        np.testing.assert_array_equal(found, alone.run({"x": x})[0][:steps])
    # The last state does.
    last = model(nodes, {"x": ("steps", 1, 6)}, {"last": (1, 1, 8)}, constants)
    with pytest.raises(InputError, match="padding them may change"):
        q.compile(last, input_shapes={"x": ([3, 7], 1, 6)}).run({"x": x[:5]})
