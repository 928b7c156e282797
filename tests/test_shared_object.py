"""Libraries that must not reach the dynamic loader."""

import platform
import struct

import pytest
import tvm_ffi.libinfo

from tvm_qfp8.errors import ModelError
from tvm_qfp8.shared_object import check_shared_object

pytestmark = pytest.mark.skipif(platform.system() != "Linux", reason="shared libraries of Linux")


@pytest.fixture
def library(tmp_path):
    """A copy of a real shared library."""
    path = tmp_path / "module.so"
    with open(tvm_ffi.libinfo.find_libtvm_ffi(), "rb") as source:
        path.write_bytes(source.read())
    return path


def test_a_whole_library_passes(library):
    check_shared_object(library)


@pytest.mark.parametrize("kept", [10, 64, 5000, -1])
def test_a_cut_library_is_refused(library, kept):
    library.write_bytes(library.read_bytes()[:kept])
    with pytest.raises(ModelError, match="is cut off: [0-9]+ bytes of"):
        check_shared_object(library)


@pytest.mark.parametrize("content", [b"", b"not a library", b"PK\x03\x04"])
def test_other_files_are_refused(library, content):
    library.write_bytes(content)
    with pytest.raises(ModelError, match="no shared library"):
        check_shared_object(library)


def test_another_machine_is_refused(library):
    data = bytearray(library.read_bytes())
    struct.pack_into("<H", data, 18, 243 if platform.machine() != "riscv64" else 62)
    library.write_bytes(data)
    with pytest.raises(ModelError, match="is made for riscv64|is made for x86_64"):
        check_shared_object(library)


def test_a_missing_file(tmp_path):
    with pytest.raises(ModelError, match="No such file"):
        check_shared_object(tmp_path / "no.so")
