"""What a person types for a target, and the nearest name for a typo."""

import json

import pytest
import tvm

from tvm_qfp8.errors import TargetError
from tvm_qfp8.host_cpu import cpuinfo_flags, feature_corrections, host_cpu, usable_cores
from tvm_qfp8.target_names import TARGETS
from tvm_qfp8.targets import cpu_features, has_vnni, isa, parse_target


@pytest.mark.parametrize("name", TARGETS)
def test_every_name_parses(name):
    target = parse_target(name)
    assert isinstance(target, tvm.target.Target)
    assert target.kind.name == TARGETS[name][1]["kind"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x86-64", "sse2"),
        ("x86-64-v2", "sse2"),
        ("x86-64-v3", "avx2"),
        ("znver3", "avx2"),
        ("x86-64-v4", "avx512"),
        ("llvm -mtriple=x86_64-linux-gnu -mattr=+avx512f", "avx2"),  # byte and word instructions are missing
        ("llvm -mtriple=x86_64-linux-gnu -mcpu=znver4 -mattr=-avx512f", "avx2"),
        ("rpi4", "neon"),
        ("llvm -mtriple=aarch64", "neon"),
        ("armv7", "generic"),
        ("riscv64", "generic"),
        ("cortex-a55", "neon"),
        ("raspberry-pi/4b-aarch64", "neon"),
    ],
)
def test_isa(text, expected):
    assert isa(parse_target(text)) == expected


@pytest.mark.parametrize(
    ("name", "expected"), [("znver3", False), ("znver4", True), ("alderlake", True), ("rpi5", False)]
)
def test_vnni(name, expected):
    assert has_vnni(parse_target(name)) is expected


@pytest.mark.parametrize(
    "alone", ["llvm", "native", None, {"kind": "llvm"}, '{"kind": "llvm"}', "llvm -mcpu=native"]
)
def test_llvm_alone_is_this_machine(alone):
    target = parse_target(alone)
    assert str(target.attrs["mcpu"]) == host_cpu()["mcpu"]
    assert int(target.attrs["num-cores"]) == usable_cores()


def test_command_line_dict_and_json_agree():
    config = {
        "kind": "llvm",
        "mtriple": "aarch64-linux-gnu",
        "mcpu": "cortex-a76",
        "mattr": ["+neon", "+dotprod"],
    }
    line = parse_target("llvm -mtriple=aarch64-linux-gnu -mattr=+neon,+dotprod -mcpu cortex-a76")
    assert str(line) == str(parse_target(config)) == str(parse_target(json.dumps(config)))
    assert parse_target(line).same_as(line)


def test_architecture_alone_means_linux():
    assert str(parse_target("llvm -mtriple=aarch64").attrs["mtriple"]) == "aarch64-linux-gnu"


def test_options_change_a_name():
    target = parse_target("rpi4 -num-cores=2")
    assert int(target.attrs["num-cores"]) == 2
    assert str(target.attrs["mcpu"]) == "cortex-a72"
    assert int(parse_target("llvm -num-cores=1").attrs["num-cores"]) == 1


def test_riscv_and_armv7_know_their_calling_convention():
    assert str(parse_target("llvm -mtriple=riscv64").attrs["mabi"]) == "lp64d"
    assert str(parse_target("armv7").attrs["mfloat-abi"]) == "hard"


def test_cuda_knows_its_architecture_and_host():
    target = parse_target("jetson-orin")
    assert str(target.attrs["arch"]) == "sm_87"
    assert str(target.host.attrs["mcpu"]) == "cortex-a78ae"
    assert isa(target) == "cuda"
    target = parse_target("cuda-sm90")
    assert str(target.attrs["arch"]) == "sm_90a"
    assert not target.host.attrs.get("mcpu"), "a server with another CPU may load the module"
    with pytest.raises(TargetError, match="kind 'opencl'"):
        isa(tvm.target.Target({"kind": "opencl"}))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("rpi44", "did you mean 'rpi4'"),
        ("lvm", "did you mean 'llvm'"),
        ("znver33", "did you mean 'znver3'"),
        ("llvm -mcpuu=znver3", "did you mean 'mcpu'"),
        ("llvm -mcpu=skylak", "did you mean 'skylake'"),
        ("llvm -mtriple=arch64-linux-gnu", "did you mean 'aarch64'"),
        ("llvm -mtriple=aarch64 -mcpu=znver3", "unknown CPU 'znver3' for aarch64-linux-gnu"),
        ("llvm -mtriple=aarch64 -mattr=+dotprd", "did you mean 'dotprod'"),
        ("llvm -mtriple=aarch64 -mattr=dotprod", r"must start with \+ or -"),
        ("llvm -num-cores=two", "whole number"),
        ("llvm -mcpu", "has no value"),
        ("llvm mcpu=znver3", "options start with '-'"),
        ('llvm -mcpu="', "cannot be read"),
        ("{kind", "not JSON"),
        ({"kind": "llvm", "foo": 1}, "Unknown config option 'foo'"),
        ({}, "kind"),
        ({"tag": "nosuch"}, "nosuch"),
        ("", "a target is a name"),
        (7, "a target is a name"),
    ],
)
def test_errors_say_what_is_meant(wrong, message):
    with pytest.raises(TargetError, match=message) as caught:
        parse_target(wrong)
    assert "\n" not in str(caught.value)


def test_hidden_features_are_switched_off():
    known = cpu_features(parse_target("znver4"))
    flags = {
        "sse2",
        "pni",
        "ssse3",
        "sse4_1",
        "sse4_2",
        "popcnt",
        "bmi1",
        "bmi2",
        "abm",
        "avx",
        "f16c",
        "fma",
        "avx2",
    }
    corrections = feature_corrections(known, flags)
    assert "-avx512f" in corrections
    assert not any(correction.startswith("+") for correction in corrections)
    masked = parse_target(
        {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "znver4", "mattr": corrections}
    )
    assert isa(masked) == "avx2"


def test_features_unknown_to_llvm_are_switched_on():
    assert feature_corrections({"sse3"}, {"pni", "avx2"}) == ["+avx2"]
    assert feature_corrections({"avx2"}, set()) == []


def test_cpuinfo(tmp_path):
    file = tmp_path / "cpuinfo"
    file.write_text("processor : 0\nflags\t\t: fpu sse2 avx2\nprocessor : 1\nflags : fpu\n")
    assert cpuinfo_flags(file) == {"fpu", "sse2", "avx2"}
    assert cpuinfo_flags(tmp_path / "missing") == set()
