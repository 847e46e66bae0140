"""Looking at data and networks: metrics, logits, curves, evaluation figures, the report, EDA."""

import contextlib
import os
import sys

# MPLBACKEND, inherited from a notebook say, may name a backend that is not installed here. Then matplotlib
# cannot even be imported, though no figure of this package needs a backend: import it without one first.
if "matplotlib" not in sys.modules and (_backend := os.environ.pop("MPLBACKEND", None)):
    import matplotlib

    with contextlib.suppress(ValueError):
        matplotlib.rcParams["backend"] = _backend
        os.environ["MPLBACKEND"] = _backend
