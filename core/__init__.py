"""What every script needs: errors, the command line, files, the machine, several processes.

Importing it sets how long OpenMP's idle threads spin. That has an effect only before torch is imported, so
every script imports this package before any other that is not Python's own.
"""

import os
import sys

# At the end of each parallel section, the threads of GNU's OpenMP, which torch uses on Linux, spin for
# 300,000 rounds before they sleep. On an otherwise idle machine that gains a few percent; beside other work
# it takes the time that this work and the other threads need. ResNet-56 in fp32 on two cores with AVX2,
# images/s of the training step alone, beside a busy loop, and of each of two runs side by side:
#     1,000 rounds     90   63   61
#    10,000 rounds    100   50   44
#   300,000 rounds    102   12   32
# The OpenMP of Intel and LLVM (macOS, Windows, conda) has another variable, KMP_BLOCKTIME, and is left alone.
SPIN_COUNT = "10000"
SETS_SPIN_COUNT = sys.platform == "linux" and not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys()
if SETS_SPIN_COUNT:
    os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT
