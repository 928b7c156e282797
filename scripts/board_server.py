"""Lets a board time kernels: an RPC server that reports to a tracker. Copy this one file to the board.

    python3 board_server.py --tracker 127.0.0.1:9190 --key rpi4

Needs only ``apache-tvm`` on the board. Whoever reaches the server runs code on the board, so it listens on loopback
unless ``--host`` says otherwise; docs/tuning.md shows how to reach it through ssh.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tracker", required=True, metavar="HOST:PORT")
    parser.add_argument("--key", required=True, help="boards with the same key share the work")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=9091, help="first port to try")
    arguments = parser.parse_args()

    import tvm

    # In runtime-only mode TVM leaves out the library that fills arguments with random values.
    extra = Path(tvm.__file__).parent / "lib" / "libtvm_runtime_extra.so"
    if extra.exists():
        ctypes.CDLL(str(extra), ctypes.RTLD_GLOBAL)

    # The server in this process: tvm.rpc.Server would start another interpreter, which fails under an emulator.
    from tvm.rpc.server import PopenRPCServerState

    host, _, port = arguments.tracker.rpartition(":")
    server = PopenRPCServerState(
        arguments.host,
        port=arguments.port,
        port_end=arguments.port + 100,
        is_proxy=False,
        tracker_addr=(host, int(port)),
        key=arguments.key,
        silent=False,
    )
    print(f"serving {arguments.key} on {arguments.host}:{server.port}", flush=True)
    while True:
        time.sleep(1)


if __name__ == "__main__":
    main()
