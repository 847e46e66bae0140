"""What every script needs: errors, the command line, files, the machine, several processes.

Importing it sets how long OpenMP's idle threads spin. That has an effect only before torch is imported, so
every script imports this package before any other that is not Python's own.
"""

import os
import sys

# At the end of each parallel section, the threads of GNU's OpenMP, which torch uses on Linux, spin for
# 300,000 rounds before they sleep. On an otherwise idle machine that gains 3 to 5 %; beside other work it
# takes the time that this work and the other threads need. ResNet-56 in bf16 on two cores trained 159
# images/s beside a busy loop with 1,000 rounds and 118 with 300,000; two runs side by side, 157 and 37 each.
# The OpenMP of Intel and LLVM (macOS, Windows, conda) has another variable, KMP_BLOCKTIME, and is left alone.
SPIN_COUNT = "1000"
SETS_SPIN_COUNT = sys.platform == "linux" and not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys()
if SETS_SPIN_COUNT:
    os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT
