"""Imports for the process that worker processes are forked from; the garbage collector ignores the imported objects."""

import gc

gc.disable()
import sersicnet.measuring.tiles  # noqa: E402, F401

gc.freeze()
gc.enable()
