"""``python -m tvm_qfp8`` is ``tvm-qfp8``."""

from tvm_qfp8.cli import main

if __name__ == "__main__":
    main()
