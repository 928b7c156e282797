"""Real models on emulated 64-bit Arm, through the bundle's C++ runner: the bits of x86."""

import importlib.util
import shutil

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.aarch64]


@pytest.mark.parametrize("name", ["mobilenetv2", "minilm"])
def test_a_real_models_bundle_gives_the_bits_of_x86(name, tmp_path):
    if shutil.which("qemu-aarch64-static") is None:
        pytest.skip("qemu-aarch64-static is not installed")
    if importlib.util.find_spec("ziglang") is None:
        pytest.skip("ziglang is not installed; pip install 'tvm-qfp8[board]'")
    pytest.importorskip("PIL", reason="needs the extra bench")
    pytest.importorskip("tokenizers", reason="needs the extra bench")
    from board_proof import prove

    found = prove(name, tmp_path, probes=1)
    assert found["values"] > 100
    assert found["different"] == 0
