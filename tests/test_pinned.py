"""Two catalogues whose values are kept: a change of results is seen, whatever it comes from.

``python tests/data/make.py`` writes them anew, if the change is meant.
"""

from pathlib import Path

import numpy as np
import pytest
from astropy.table import QTable

from sersicnet.measuring.measure import measure

DATA = Path(__file__).parent / "data"
IMAGES = {
    "example": Path(__file__).parents[1] / "docs" / "example" / "mosaic.fits",
    "real-like": DATA / "real-like.fits",
}


@pytest.mark.parametrize("name", IMAGES)
def test_the_catalogue_is_the_pinned_one(name):
    pinned, found = QTable.read(DATA / f"{name}.ecsv"), measure(IMAGES[name])
    assert len(found) == len(pinned)
    for column in pinned.colnames:
        expected, values = (np.asarray(getattr(table[column], "value", table[column])) for table in (pinned, found))
        if column == "flags":
            np.testing.assert_array_equal(values, expected)
        else:
            np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-4, err_msg=column)
