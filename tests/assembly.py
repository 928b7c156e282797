"""What several tests look for in the assembly of kernels."""

import re

FUNCTION = re.compile(r"^[A-Za-z_]\w*:$", re.MULTILINE)
FUSED = re.compile(r"^\s+v?(fn?m(add|sub|la|ls)\w*|fml[as]\w*)\s")


def fused_multiply_adds(assembly: str) -> list[str]:
    """Lines with one, but for those by a constant 1, which are additions."""
    ones = set(re.findall(r"^(\.LCPI\w+):\n\s+\.long\s+0x3f800000", assembly, re.MULTILINE))
    found = []
    for function in FUNCTION.split(assembly):
        loads = re.findall(r"vbroadcastss\s+(\.LCPI\w+)\(%rip\), (%zmm\d+)", function)
        names = {register for label, register in loads if label in ones} | ones
        for line in function.splitlines():
            if FUSED.search(line) and not names.intersection(re.findall(r"%zmm\d+|\.LCPI\w+", line)):
                found.append(line.strip())
    return found
