"""What worker processes are copies of: all that they need is imported, and no search for garbage sees it."""

import gc

gc.disable()
import sersicnet.measuring.tiles  # noqa: E402, F401

gc.freeze()
gc.enable()
