"""ONNX's own node tests: one of each operator compiles and computes what ONNX says, or is refused in one line."""

import numpy as np
import pytest
from onnx.backend.test.case.node import collect_testcases

import tvm_qfp8
from tvm_qfp8.errors import QFP8Error

pytestmark = pytest.mark.slow

# The first test of each of these operators, by name, as onnx lists them.
NAMES = [
    "test_abs",
    "test_acos",
    "test_acosh",
    "test_add",
    "test_affine_grid_2d",
    "test_and2d",
    "test_argmax_default_axis_example",
    "test_argmin_default_axis_example",
    "test_asin",
    "test_asinh",
    "test_atan",
    "test_atanh",
    "test_averagepool_1d_default",
    "test_basic_conv_with_padding",
    "test_basic_deform_conv_with_padding",
    "test_batchnorm_epsilon",
    "test_blackmanwindow",
    "test_causal_conv_with_state_b1_c1_degenerate",
    "test_ceil",
    "test_celu",
    "test_center_crop_pad_crop",
    "test_clip",
    "test_col2im",
    "test_compress_0",
    "test_concat_1d_axis_0",
    "test_constant",
    "test_constant_pad",
    "test_constantofshape_float_ones",
    "test_convtranspose",
    "test_cos",
    "test_cosh",
    "test_cumprod_1d_int32_exclusive",
    "test_cumsum_1d_int32_exclusive",
    "test_depthtospace_crd_mode_example",
    "test_det_2d",
    "test_dft",
    "test_div",
    "test_dropout_default",
    "test_elu",
    "test_equal",
    "test_erf",
    "test_exp",
    "test_expand_dim_changed",
    "test_eyelike_populate_off_main_diagonal",
    "test_flatten_axis0",
    "test_flexattention",
    "test_floor",
    "test_gather_0",
    "test_gather_elements_0",
    "test_gathernd_example_float32",
    "test_gelu_default_1",
    "test_gemm_all_attributes",
    "test_globalaveragepool",
    "test_globalmaxpool",
    "test_greater",
    "test_greater_equal",
    "test_gridsample",
    "test_group_normalization_epsilon",
    "test_gru_batchwise",
    "test_hammingwindow",
    "test_hannwindow",
    "test_hardmax_axis_0",
    "test_hardsigmoid",
    "test_hardswish",
    "test_identity",
    "test_if",
    "test_instancenorm_epsilon",
    "test_isinf",
    "test_isnan",
    "test_l1normalization_axis_0",
    "test_layer_normalization_2d_axis0",
    "test_leakyrelu",
    "test_less",
    "test_less_equal",
    "test_log",
    "test_logsoftmax_axis_0",
    "test_loop11",
    "test_lppool_1d_default",
    "test_lrn",
    "test_lstm_batchwise",
    "test_matmul_1d_1d",
    "test_max_example",
    "test_maxpool_1d_default",
    "test_maxunpool_export_with_output_shape",
    "test_mean_example",
    "test_melweightmatrix",
    "test_min_example",
    "test_mish",
    "test_mod_float32_mixed_sign_fmod_0",
    "test_mul",
    "test_mvn",
    "test_neg",
    "test_nonmaxsuppression_center_point_box_format",
    "test_nonzero_example",
    "test_not_2d",
    "test_onehot_negative_indices",
    "test_or2d",
    "test_pow",
    "test_prelu_example",
    "test_range_float_type_positive_delta",
    "test_reciprocal",
    "test_reduce_l1_default_axes_keepdims_example",
    "test_reduce_l2_default_axes_keepdims_example",
    "test_reduce_log_sum_asc_axes",
    "test_reduce_log_sum_exp_empty_set",
    "test_reduce_max_bool_inputs",
    "test_reduce_mean_default_axes_keepdims_example",
    "test_reduce_min_bool_inputs",
    "test_reduce_prod_default_axes_keepdims_example",
    "test_reduce_sum_default_axes_keepdims_example",
    "test_reduce_sum_square_default_axes_keepdims_example",
    "test_relu",
    "test_reshape_allowzero_reordered",
    "test_resize_downsample_scales_cubic",
    "test_rms_normalization_2d_axis0",
    "test_rnn_seq_length",
    "test_roialign_aligned_false",
    "test_rotary_embedding",
    "test_round",
    "test_scan9_multi_state",
    "test_scatter_elements_with_axis",
    "test_scatter_with_axis",
    "test_scatternd",
    "test_selu",
]


@pytest.fixture(scope="module")
def cases():
    return {case.name: case for case in collect_testcases(None)}


@pytest.mark.parametrize("name", NAMES)
def test_supported_or_refused(cases, name):
    if name not in cases:
        pytest.skip("this version of onnx has no such test")
    model, (inputs, expected) = cases[name].model, cases[name].data_sets[0]
    try:
        module = tvm_qfp8.compile(model)
    except QFP8Error as error:
        assert "\n" not in str(error)
        return
    names = [value.name for value in model.graph.input]
    for ours, theirs in zip(module.run(dict(zip(names, inputs, strict=True))), expected, strict=True):
        assert ours.shape == np.shape(theirs)
        np.testing.assert_allclose(ours, theirs, rtol=0.03, atol=0.03)
