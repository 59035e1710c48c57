"""Imports for the process that worker processes are forked from; the garbage collector ignores the imported objects."""

import gc
import logging

gc.disable()
import sersicnet.measuring.tiles  # noqa: E402, F401
from sersicnet.image.deblend import photutils_segmentation  # noqa: E402

photutils_segmentation()

logging.getLogger("astropy").setLevel(logging.ERROR)  # astropy prints its INFO on stdout
gc.freeze()
gc.enable()
