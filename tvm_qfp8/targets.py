"""Targets: what a person types, as a ``tvm.target.Target``.

Accepted are names (``native``, ``x86-64-v3``, ``rpi4``, ``cuda-sm80``), LLVM's CPU names (``znver4``,
``cortex-a53``), the classic command line (``llvm -mtriple=aarch64-linux-gnu -mattr=+neon,+dotprod``), TVM's tags
(``raspberry-pi/4b-aarch64``), dicts and JSON. A typo is answered with the nearest name.
"""

from __future__ import annotations

import difflib
import json
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from tvm.target import Target, TargetKind, codegen
from tvm.target.tag import list_tags

from tvm_qfp8.errors import TargetError
from tvm_qfp8.host_cpu import host_cpu
from tvm_qfp8.target_names import AARCH64, CUDA_LIMITS, RISCV64, TARGETS, TRIPLES, X86

OLDEST_GPU = 80
"""Compute capability times ten from which tensor cores take 16 x 8 x 16 products of float16."""


def parse_target(target: str | Mapping[str, Any] | Target | None = None) -> Target:
    """The TVM target meant by a name, command line, dict, JSON text, tag or Target.

    ``None``, ``"llvm"`` without CPU, triple or features, and ``"native"`` mean this machine with all its features.

    Raises
    ------
    TargetError
        An unknown name, option, CPU or feature; the message holds the nearest known one.
    """
    if target is None:
        return Target(host_cpu())
    if isinstance(target, Target):
        return target
    if isinstance(target, Mapping):
        return _from_config(dict(target))
    if not isinstance(target, str) or not target.strip():
        raise TargetError(
            f"a target is a name, a command line, a dict or a tvm.target.Target, not {target!r}; "
            "`tvm-qfp8 targets` lists the names"
        )
    text = target.strip()
    if text.startswith("{"):
        return _from_config(_parse_json(text))
    try:
        name, *options = shlex.split(text)
    except ValueError as error:
        raise TargetError(f"the target {text!r} cannot be read: {str(error).lower()}") from error
    return _from_config(_parse_options(_named(name), options))


def isa(target: Target) -> str:
    """Which kernels fit a target: ``avx512``, ``avx2``, ``sse2``, ``neon`` or ``generic`` on a CPU, else ``cuda``.

    Raises
    ------
    TargetError
        There are no kernels for the target.
    """
    if target.kind.name == "cuda":
        return "cuda"
    features = cpu_features(target)
    if {"avx512f", "avx512bw", "avx512dq"} <= features:
        return "avx512"
    for feature, name in (("avx2", "avx2"), ("sse2", "sse2")):
        if feature in features:
            return name
    # The NEON kernels use look-ups that only 64-bit Arm has.
    triple = str(target.attrs.get("mtriple", codegen.llvm_get_system_triple()))
    return "neon" if "neon" in features and triple.startswith(("aarch64", "arm64")) else "generic"


def host_of(target: Target) -> Target:
    """The CPU that runs a target's program: the target itself, or the one beside the GPU."""
    return target if target.kind.name == "llvm" else target.host


def has_vnni(target: Target) -> bool:
    """Whether the target multiplies and adds bytes into int32 in one instruction (AVX512-VNNI or AVX-VNNI)."""
    return not cpu_features(target).isdisjoint({"avx512vnni", "avxvnni"})


def cpu_features(target: Target) -> set[str]:
    """LLVM's names of the features that a CPU target has.

    Raises
    ------
    TargetError
        The target is no CPU.
    """
    if target.kind.name != "llvm":
        raise TargetError(
            f"there are no kernels for targets of kind {target.kind.name!r}; supported are CPUs, such as "
            "'native', 'x86-64-v3' or 'rpi4', and NVIDIA GPUs, such as 'cuda-sm80'"
        )
    return {str(feature) for feature in codegen.llvm_get_cpu_features(target)}


def _named(name: str) -> dict[str, Any]:
    if name in TARGETS:
        return dict(TARGETS[name][1])
    if name in Target.list_kinds():
        return {"kind": name}
    tags = list_tags() or {}
    if name in tags:
        return {"tag": name}
    cpus = {
        str(cpu): triple
        for triple in (RISCV64, AARCH64, X86)
        for cpu in codegen.llvm_get_cpu_archlist(Target({"kind": "llvm", "mtriple": triple}))
    }
    if name in cpus and name != "generic":
        return {"kind": "llvm", "mtriple": cpus[name], "mcpu": name}
    near = _nearest(name, list(TARGETS)) or _nearest(name, [*Target.list_kinds(), *tags, *cpus])
    raise TargetError(f"unknown target {name!r}{near}; `tvm-qfp8 targets` lists the names")


def _parse_json(text: str) -> dict[str, Any]:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise TargetError(f"the target starts with '{{' but is not JSON: {error}") from error


def _parse_options(config: dict[str, Any], options: list[str]) -> dict[str, Any]:
    kind = config.get("kind") or Target(config).kind.name
    known = {str(key): str(value) for key, value in TargetKind.options_from_name(kind).items()}
    waiting = list(options)
    while waiting:
        option = waiting.pop(0)
        key, has_value, value = option.lstrip("-").partition("=")
        if not option.startswith("-") or key not in known:
            found = option if option.startswith("-") else f"{option} (options start with '-')"
            raise TargetError(
                f"unknown target option {found}{_nearest(key, known)}; {kind} knows {', '.join(known)}"
            )
        if not has_value and known[key] == "bool":
            value = "1"
        elif not has_value:
            if not waiting:
                raise TargetError(f"target option -{key} has no value; write -{key}=VALUE")
            value = waiting.pop(0)
        config[key] = _convert(key, value, known[key])
    return config


def _convert(key: str, value: str, type_name: str) -> Any:
    if type_name == "Array<str>":
        return [item for item in value.split(",") if item]
    if type_name == "bool":
        return value.lower() in ("1", "true", "on", "yes")
    if type_name == "int":
        if not value.lstrip("-").isdigit():
            raise TargetError(f"target option -{key} takes a whole number, not {value!r}")
        return int(value)
    return value


def _from_config(config: dict[str, Any]) -> Target:
    if isinstance(config.get("host"), str):
        config["host"] = dict(parse_target(config["host"]).export())
    if isinstance(config.get("mattr"), str):
        config["mattr"] = config["mattr"].split(",")
    if config.get("kind") == "llvm":
        config = _complete_cpu(config)
    if config.get("kind") == "cuda":
        config = _complete_gpu(config)
    try:
        target = Target(config)
    except (ValueError, RuntimeError, TypeError) as error:
        reason = str(error).strip().splitlines()[-1].partition(" Target creation from")[0].rstrip(". ")
        raise TargetError(f"TVM refuses the target: {reason}") from error
    if target.kind.name == "llvm":
        _check_features(target)
    return target


def _complete_cpu(config: dict[str, Any]) -> dict[str, Any]:
    if not any(config.get(key) for key in ("mcpu", "mtriple", "mattr")):
        return host_cpu() | config
    config = dict(config)
    triple = config.get("mtriple") or str(codegen.llvm_get_system_triple())
    config["mtriple"] = triple = TRIPLES.get(triple, triple)
    _check_architecture(triple)
    if triple.startswith("riscv64") and not config.get("mcpu"):
        config.setdefault("mattr", ["+m", "+a", "+f", "+d", "+c"])
        config.setdefault("mabi", "lp64d")
    if triple.endswith("eabihf"):
        config.setdefault("mfloat-abi", "hard")
    if config.get("mcpu") == "native":
        config = host_cpu() | {key: value for key, value in config.items() if key not in ("mcpu", "mtriple")}
    cpu = config.get("mcpu")
    if cpu and not codegen.llvm_is_valid_cpu(cpu, config["mtriple"]):
        known = codegen.llvm_get_cpu_archlist(Target({"kind": "llvm", "mtriple": config["mtriple"]}))
        raise TargetError(
            f"unknown CPU {cpu!r} for {config['mtriple']}{_nearest(cpu, known)}; "
            "LLVM's names are meant, and -mtriple must fit the CPU"
        )
    return config


def _complete_gpu(config: dict[str, Any]) -> dict[str, Any]:
    arch = config.get("arch", "sm_80")
    number = arch.removeprefix("sm_").rstrip("af")
    if not arch.startswith("sm_") or not number.isdigit() or int(number) < OLDEST_GPU:
        raise TargetError(
            f"CUDA architecture {arch!r} is not supported: kernels need sm_{OLDEST_GPU} or newer, as in 'cuda-sm80'"
        )
    # All that the host computes is which kernel is next, so any CPU of this machine's kind shall do. sm_90's tensor
    # cores have instructions that only the architecture's own code, "a", may use.
    host = {"kind": "llvm", "mtriple": str(codegen.llvm_get_system_triple())}
    return {"host": host} | CUDA_LIMITS | config | {"arch": "sm_90a" if arch == "sm_90" else arch}


def _check_architecture(triple: str) -> None:
    architecture = triple.partition("-")[0]
    known = [str(name) for name in codegen.llvm_get_targets()]
    spelled = (*known, "arm64", "armv", "thumbv", "i486", "i586", "i686", "amd64")
    if not any(
        architecture == name or (name.endswith("v") and architecture.startswith(name)) for name in spelled
    ):
        raise TargetError(
            f"unknown architecture {architecture!r} in -mtriple={triple}{_nearest(architecture, known)}; "
            "a triple looks like aarch64-linux-gnu"
        )


def _check_features(target: Target) -> None:
    attrs = target.attrs
    wanted = [str(feature) for feature in attrs.get("mattr", [])]
    for feature in wanted:
        if feature[:1] not in "+-":
            raise TargetError(f"target feature {feature!r} must start with + or -, as in -mattr=+neon,-sve")
    # LLVM only warns about a feature it does not know, so each is switched on alone and looked for.
    triple = str(attrs["mtriple"]) if "mtriple" in attrs else str(codegen.llvm_get_system_triple())
    for name in (feature[1:] for feature in wanted):
        probe = Target({"kind": "llvm", "mtriple": triple, "mattr": ["+" + name]})
        if name not in cpu_features(probe):
            raise TargetError(
                f"unknown feature {name!r} in -mattr for {triple}{_nearest(name, _all_features(triple))}"
            )


def _all_features(triple: str) -> set[str]:
    base = {"kind": "llvm", "mtriple": triple}
    names: set[str] = set()
    for cpu in codegen.llvm_get_cpu_archlist(Target(base)):
        names |= cpu_features(Target(base | {"mcpu": str(cpu)}))
    return names


def _nearest(name: str, known: Iterable[Any]) -> str:
    close = difflib.get_close_matches(name, [str(item) for item in known], n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""
