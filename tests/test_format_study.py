"""The comparison of formats: the grids, the search for scales, the page made from the results."""

import json

import formats_page
import numpy as np
import pytest
from format_study.formats import FORMATS
from format_study.grids import GRIDS
from format_study.large import Received
from format_study.scales import Histogram, weight_scale
from format_study.simulate import Mode, NearestWeights, Network, Quantized
from tvm import relax

from tvm_qfp8.calibration.fake_quantize import fake_quantize
from tvm_qfp8.calibration.rounding import ColumnRounding, RoundedRows


def test_posits_are_those_of_the_standard():
    assert GRIDS["posit8 es 0"].top == 64 and GRIDS["posit8 es 1"].top == 4096
    for es in (0, 1):
        levels = GRIDS[f"posit8 es {es}"].levels
        assert len(levels) == 255 and 1.0 in levels and levels[levels > 0].min() == 1 / levels[-1]


def test_float8_grids():
    assert GRIDS["E4M3"].top == 448 and GRIDS["E5M2"].top == 57344 and GRIDS["E3M4"].top == 15.5


def test_the_code_book_has_all_codes():
    assert len(GRIDS["NF8"].levels) == 256 and 0.0 in GRIDS["NF8"].levels


@pytest.mark.parametrize("layout", ["E1M6", "E2M5", "E3M4", "UE2M6", "UE3M5"])
def test_rounding_is_the_format_modules_except_at_ties(layout):
    x = np.random.default_rng(0).normal(0, 1, 10000).astype(np.float32)
    found, expected = GRIDS[f"QFP8 {layout}"].round(x, 0.01), fake_quantize(x, layout, 0.01)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", GRIDS)
def test_every_level_rounds_to_itself(name):
    grid = GRIDS[name]
    np.testing.assert_array_equal(
        grid.round(grid.levels.astype(np.float32), 1.0), grid.levels.astype(np.float32)
    )


def test_the_search_finds_the_known_sqnr_of_a_gaussian():
    """DESIGN's table: the best scale of each format for Gaussian values, in dB."""
    rows = np.random.default_rng(0).normal(0, 1, (1, 200_000)).astype(np.float32)
    for name, expected in {"int8": 40.5, "QFP8 E2M5": 42.7, "E4M3": 31.6, "E5M2": 25.6}.items():
        scale = weight_scale(rows, GRIDS[name], "mse")[:, None]
        error = GRIDS[name].round(rows, scale) - rows
        assert 10 * np.log10(np.square(rows).sum() / np.square(error).sum()) == pytest.approx(
            expected, abs=0.15
        )


def test_activations_take_an_unsigned_grid_only_without_negative_values():
    grids = (GRIDS["int8"], GRIDS["uint8"])
    for low, expected in ((0.0, "uint8"), (-1.0, "int8")):
        histogram = Histogram()
        histogram.add(np.random.default_rng(0).uniform(low, 1, 1000).astype(np.float32))
        assert histogram.choose(grids, "mse")[0][0].name == expected


def test_the_page_is_current():
    record, trained = (json.loads(path.read_text()) for path in (formats_page.RESULTS, formats_page.QAT))
    assert formats_page.page(record, trained) == formats_page.PAGE.read_text(), "run scripts/formats_page.py"


def test_qfp8_has_the_best_mean_sqnr():
    groups = formats_page.model_groups(json.loads(formats_page.RESULTS.read_text()))
    for mode in formats_page.MODES:
        ours = formats_page.mean_over_models(groups, "QFP8", mode)
        assert all(ours > formats_page.mean_over_models(groups, name, mode) for name in formats_page.RIVALS)


def test_a_perplexity_is_shown_where_its_inverse_is_scored():
    part = {"score": 1 / 40, "above_qfp8": 1 / 40 - 1 / 42, "standard_error": 0.001}
    assert formats_page._perplexity(part) == "40.000 (-2.000 ± 1.680)"
    case = {"format": "int8 max", "mode": "weights", "sqnr_db": 20.0, "tasks": {"news": part}}
    ours = {**case, "format": "QFP8", "sqnr_db": 30.0}
    losses = formats_page._losses([("llm", [{"metrics": {"news": "1 / perplexity"}, "cases": [ours, case]}])])
    assert "- llm, weights: int8 max scores 40.000 (-2.000 ± 1.680) in news." in losses


def test_large_matrices_are_rounded_as_others_are():
    rng = np.random.default_rng(0)
    exact = (rng.normal(0, 1, (800, 70)) @ rng.normal(0, 1, (70, 70))).astype(np.float32)
    received = exact + rng.normal(0, 0.5, exact.shape).astype(np.float32)
    weight = rng.normal(0, 1, (40, 70)).astype(np.float32)
    grids = [GRIDS["E5M2"], GRIDS["E4M3"]]
    scales = [weight_scale(weight, grid, "mse").astype(np.float32) for grid in grids]
    nearest = [grid.round(weight, scale[:, None]) for grid, scale in zip(grids, scales, strict=True)]
    candidates = [
        RoundedRows(rows[None], scale[None], grid.round)
        for rows, scale, grid in zip(nearest, scales, grids, strict=True)
    ]
    found = Received(received, exact).rounded(weight, candidates)

    def errors(rows):
        return (received @ rows.T - exact @ weight.T).var(0)

    columns = ColumnRounding.of(np.cov(received.T, bias=True)[None] * len(received))
    (expected,) = columns.rounded(weight[None], scales[1][None], grids[1].round)
    better = errors(expected) < errors(nearest[1])
    same = found == np.where(better[:, None], expected, nearest[1])
    assert better.any() and same.mean() > 0.99


def test_logits_are_compared_where_a_model_ends_in_a_softmax():
    network = Network(_softmax_model(), [{"x": np.ones((1, 8), np.float32)}])
    probe = {"x": np.arange(8, dtype=np.float32)[None] / 8}
    logits = network.compare(probe)
    (probabilities,) = network.run(probe)
    assert abs(logits.mean()) < 1e-6
    np.testing.assert_allclose(np.exp(logits) / np.exp(logits).sum(), probabilities, rtol=1e-5)


def test_a_quantized_network_is_corrected_on_its_samples():
    rng = np.random.default_rng(0)
    samples = [{"x": rng.normal(1, 1, (1, 8)).astype(np.float32)} for _ in range(16)]
    network = Network(_softmax_model(), samples)
    (format_,) = (one for one in FORMATS if one.name == "E5M2")
    quantized = Quantized(network, NearestWeights(network, format_), Mode(activations=True))
    exact, found = (np.concatenate([n.compare(one) for one in samples]) for n in (network, quantized))
    assert 0 < np.abs(exact - found).max() < 0.5
    np.testing.assert_allclose(found.mean(0), exact.mean(0), atol=1e-5)


def test_a_scale_for_each_row_forgives_rows_of_other_sizes():
    """Which rows are large is not known before: one scale for all has to hold the largest."""
    rng = np.random.default_rng(0)
    sizes = 10.0 ** rng.integers(-3, 3, (4, 1))
    samples = [
        {"x": (rng.normal(0, 1, (4, 8)) * rng.permutation(sizes)).astype(np.float32)} for _ in range(8)
    ]
    network = Network(_softmax_model(rows=4), samples)
    (format_,) = (one for one in FORMATS if one.name == "int8 mse")
    nearest = NearestWeights(network, format_)
    errors = {}
    for by_row in (False, True):
        quantized = Quantized(network, nearest, Mode(activations=True, by_row=by_row))
        quantized.corrections.clear()  # they are the same for all rows
        exact, found = (np.stack([n.compare(one) for one in samples]) for n in (network, quantized))
        errors[by_row] = (np.abs(exact - found).max(-1) / np.abs(exact).max(-1)).mean()
    assert errors[True] < 0.03 < 10 * errors[True] < errors[False]


def test_a_grid_for_rows_is_chosen_for_the_layers_that_read_them():
    """Two channels are a hundred times as large as the rest; whether their weights count decides between grids."""
    rng = np.random.default_rng(0)
    samples = [{"x": rng.normal(0, 1, (4, 8)).astype(np.float32)} for _ in range(8)]
    for sample in samples:
        sample["x"][:, :2] = rng.uniform(30, 100, (4, 2))
    network = Network(_softmax_model(rows=4), samples)
    (linear,) = network.linear.values()
    (format_,) = (one for one in FORMATS if one.name == "QFP8")
    nearest = NearestWeights(network, format_)
    chosen = {}
    for gain in (0.0, 100.0):
        linear.weight[:2] = gain
        quantized = Quantized(network, nearest, Mode(activations=True, by_row=True))
        chosen[gain] = quantized.activations[linear.source][0].name
    assert chosen[0.0] == "QFP8 E3M4" != chosen[100.0]


def _softmax_model(rows=1):
    weight = np.random.default_rng(1).normal(0, 1, (8, 5)).astype(np.float32)
    x = relax.Var("x", relax.TensorType((rows, 8), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            logits = builder.emit(relax.op.matmul(x, relax.const(weight)))
            out = builder.emit_output(relax.op.nn.softmax(logits))
        builder.emit_func_output(out)
    return builder.get()
