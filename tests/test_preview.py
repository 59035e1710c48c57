import numpy as np
import pytest
from matplotlib.image import imread

from sersicnet.errors import InputError
from sersicnet.simulating.preview import preview
from sersicnet.simulating.recipe import Simulation


def test_a_preview_shows_every_stamp(tmp_path):
    sheet = imread(preview(tmp_path / "sheet.png", Simulation(9)))
    dark = sheet[:, :, :3].mean(axis=2) < 0.95
    assert sheet.shape[1] > 1000
    assert np.mean(dark[: len(dark) // 2]) > 2 * np.mean(dark[len(dark) // 2 :]) > 0
    assert [p.name for p in tmp_path.iterdir()] == ["sheet.png"]


def test_a_preview_can_be_a_pdf(tmp_path):
    assert preview(tmp_path / "sheet.pdf", Simulation(1)).read_bytes().startswith(b"%PDF")


def test_a_preview_is_called_png_or_pdf_and_replaces_nothing(tmp_path):
    with pytest.raises(InputError, match=r"ends in .png or .pdf; received sheet.gif"):
        preview(tmp_path / "sheet.gif", Simulation(1))
    (tmp_path / "mine.png").write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        preview(tmp_path / "mine.png", Simulation(1))
