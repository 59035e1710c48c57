import gzip

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table
from conftest import turned

from sersicnet.errors import InputError
from sersicnet.image.detect import Detector
from sersicnet.image.mosaic import read_image
from sersicnet.image.pixels import Sky, without_data
from sersicnet.image.stamps import cut


def flat_sky(data, rms=1.0):
    return Sky(np.zeros_like(data), np.full_like(data, rms), np.ones((1, 1)), np.nan)


def test_reads_the_first_image(blank):
    image = read_image(blank())
    assert image.data.shape == (200, 220)
    assert image.data.dtype == np.float32
    assert image.data.dtype.isnative
    assert image.wcs is None


def test_sci_goes_first_and_an_extension_can_be_chosen(tmp_path):
    path = tmp_path / "multi.fits"
    planes = [fits.ImageHDU(np.full((20, 20), i, np.int16), name=name) for i, name in enumerate(("ERR", "SCI", "DQ"))]
    fits.HDUList([fits.PrimaryHDU(), *planes]).writeto(path)
    assert read_image(path).data[0, 0] == 1
    assert read_image(path, "dq").data[0, 0] == 2
    assert read_image(path, "1").data[0, 0] == 0
    for wrong in ("7", "WHT"):
        with pytest.raises(InputError, match=f"no extension {wrong}; it has 0 PRIMARY, 1 ERR, 2 SCI, 3 DQ"):
            read_image(path, wrong)


def test_brackets_and_preferred_names_choose_an_extension(tmp_path):
    path = tmp_path / "multi.fits"
    planes = [fits.ImageHDU(np.full((20, 20), i, np.int16), name=name) for i, name in enumerate(("SCI", "WHT"))]
    primary = fits.PrimaryHDU(header=fits.Header({"PHOTFLAM": 2e-20, "CRVAL1": 3.0}))
    fits.HDUList([primary, *planes]).writeto(path)
    assert read_image(f"{path}[WHT]").data[0, 0] == 1
    assert read_image(path, prefer=("WHT",)).data[0, 0] == 1
    assert read_image(path).data[0, 0] == 0
    assert read_image(path).header["PHOTFLAM"] == 2e-20
    assert "CRVAL1" not in read_image(path).header


def test_scaled_integers_are_unscaled(tmp_path):
    data = np.arange(400, dtype=np.uint16).reshape(20, 20)
    fits.PrimaryHDU(data).writeto(tmp_path / "u.fits")
    np.testing.assert_array_equal(read_image(tmp_path / "u.fits").data, data)


def test_unreadable_images(tmp_path, blank):
    good = blank().read_bytes()
    cases = {
        "none.fits": (None, "no such file"),
        "text.fits": (b"hello world\n" * 400, "not a readable FITS file"),
        "cut.fits": (good[: len(good) // 2], "cut short"),
        "cut.fits.gz": (gzip.compress(good)[:40000], "cut short"),
        "empty.fits": (b"", "not a readable FITS file"),
    }
    for name, (content, message) in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=message) as caught:
            read_image(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="a directory"):
        read_image(tmp_path)


def test_what_is_no_image(tmp_path, blank):
    Table({"a": [1.0]}).write(tmp_path / "table.fits")
    with pytest.raises(InputError, match="holds no image"):
        read_image(tmp_path / "table.fits")
    with pytest.raises(InputError, match=r"table.fits\[1\] is a table"):
        read_image(tmp_path / "table.fits", 1)
    with pytest.raises(InputError, match="holds no data"):
        read_image(tmp_path / "table.fits", 0)
    with pytest.raises(InputError, match="3 axes"):
        read_image(blank("cube.fits", data=np.zeros((3, 30, 30))))
    with pytest.raises(InputError, match="at least 16"):
        read_image(blank("tiny.fits", data=np.zeros((30, 3))))
    with pytest.raises(InputError, match="no finite pixel"):
        _ = read_image(blank("nan.fits", data=np.full((30, 30), np.nan))).data
    with pytest.raises(InputError, match="must agree"):
        read_image(blank("small.fits", data=np.zeros((30, 31))), shape=(31, 30))


def test_galaxies_are_found_where_they_are(field):
    image, truth = read_image(field[0]), field[1]
    _, found = Detector()(image.data, np.zeros(image.data.shape, bool))
    inside = (truth["x"] > 5) & (truth["x"] < 506) & (truth["y"] > 5) & (truth["y"] < 506)
    distance = np.hypot(truth["x"][:, None] - found.x, truth["y"][:, None] - found.y).min(axis=1)
    assert (distance[inside] < 2).mean() >= 0.85
    assert found.theta.min() >= -90
    assert found.theta.max() <= 90


def test_sky_and_noise_are_recovered(field):
    image = read_image(field[0])
    sky, _ = Detector()(image.data + 0.7, np.zeros(image.data.shape, bool))
    assert np.median(sky.rms) == pytest.approx(0.0035, rel=0.03)
    assert np.median(sky.level) == pytest.approx(0.7, abs=0.001)
    assert sky.correlation == pytest.approx(2.2, rel=0.15)


def test_white_noise_is_not_called_correlated(blank):
    image = read_image(blank())
    sky, found = Detector()(image.data, np.zeros(image.data.shape, bool))
    assert sky.correlation == pytest.approx(1.0, abs=0.15)
    assert len(found) == 0
    assert not found.segmentation.any()


def test_a_noise_map_is_scaled_to_the_image(blank):
    image = read_image(blank())
    relative = np.full(image.data.shape, 7.0, np.float32)
    sky, _ = Detector()(image.data, np.zeros(image.data.shape, bool), relative)
    assert sky.map_factor == pytest.approx(1 / 7, rel=0.05)
    assert np.median(sky.rms) == pytest.approx(1, rel=0.05)


def test_zeros_outside_of_the_footprint_are_no_data(blank):
    data = np.random.default_rng(0).normal(0, 1, (200, 220)).astype(np.float32)
    data[:, :60] = 0
    image = read_image(blank(data=data))
    bad = image.without_data()
    assert bad[:, :60].all()
    assert not bad[:, 60:].any()
    sky, found = Detector()(image.data, bad)
    assert len(found) == 0
    assert np.nanmedian(sky.rms) == pytest.approx(1, rel=0.05)


def test_a_few_zeros_are_data(blank):
    data = np.random.default_rng(0).normal(0, 1, (200, 220)).astype(np.float32)
    data[np.random.default_rng(1).random(data.shape) < 0.05] = 0
    assert not read_image(blank(data=data)).without_data().any()


def test_bad_pixels_are_no_sources(blank):
    data = np.random.default_rng(0).normal(0, 1, (200, 220)).astype(np.float32)
    data[50:70] = 1e6
    bad = np.zeros(data.shape, bool)
    bad[50:70] = True
    sky, found = Detector()(data, bad)
    assert len(found) == 0
    assert np.isnan(sky.rms[bad]).all()
    assert np.nanmedian(sky.rms) == pytest.approx(1, rel=0.05)


def test_an_image_without_noise_is_refused():
    with pytest.raises(InputError, match="no noise"):
        Detector()(np.zeros((100, 100), np.float32), np.zeros((100, 100), bool))


def test_touching_galaxies_are_separated_and_marked():
    y, x = np.indices((300, 300))
    data = np.random.default_rng(0).normal(0, 1, (300, 300)).astype(np.float32)
    for x0 in (140, 158):
        data += 100 * np.exp(-((x - x0) ** 2 + (y - 150) ** 2) / (2 * 5.0**2)).astype(np.float32)
    data += 100 * np.exp(-((x - 40) ** 2 + (y - 40) ** 2) / (2 * 3.0**2)).astype(np.float32)
    _, found = Detector()(data, np.zeros(data.shape, bool))
    assert len(found) == 3
    assert list(found.blended[np.argsort(found.x)]) == [False, True, True]


def test_a_stamp_knows_which_part_of_it_is_inside_the_image():
    data = np.ones((200, 200), np.float32)
    stamps = cut(data, np.zeros(data.shape, bool), flat_sky(data), np.array([10.0, 100.0]), np.array([100.0, 100.0]))
    assert stamps.inside.tolist() == [[0, 128, 54, 128], [0, 128, 0, 128]]
    assert list(stamps.unusable) == [0, 0]


@pytest.mark.parametrize("position", [(-500.0, 3.0), (np.nan, 5.0), (1e9, 1e9)])
def test_a_position_outside_gives_an_empty_stamp(position):
    data = np.ones((200, 200), np.float32)
    stamps = cut(data, np.zeros(data.shape, bool), flat_sky(data), *(np.array([p]) for p in position))
    assert stamps.empty[0]
    assert np.isnan(stamps.rms[0])


def test_pixels_are_in_units_of_the_noise():
    data = np.full((200, 200), 6.0, np.float32)
    stamps = cut(data, np.zeros(data.shape, bool), flat_sky(data, 2.0), np.array([100.0]), np.array([100.0]))
    assert (stamps.pixels == 3).all()


def test_neighbours_and_holes_take_the_opposite_side():
    y, x = np.indices((200, 200))
    galaxy = 100 * np.exp(-((x - 100) ** 2 + (y - 100) ** 2) / 200).astype(np.float32)
    data, bad, labels = galaxy.copy(), np.zeros(galaxy.shape, bool), np.zeros(galaxy.shape, np.int32)
    labels[90:111, 90:111] = 1
    labels[100:110, 111:121] = 2
    data[labels == 2] += 500
    data[80:84, 100:104], bad[80:84, 100:104] = np.nan, True
    stamps = cut(data, bad, flat_sky(data), np.array([100.0]), np.array([100.0]), labels, np.array([1]))
    clean = cut(galaxy, np.zeros_like(bad), flat_sky(data), np.array([100.0]), np.array([100.0]))
    np.testing.assert_allclose(stamps.pixels, clean.pixels, atol=1e-3)
    assert 0.005 < stamps.neighbours[0] < 0.02
    assert stamps.unusable[0] == pytest.approx(16 / 128**2)


def test_detector_shows_its_options():
    assert "level=3.0" in repr(Detector())


def test_world_coordinates_need_a_wcs(blank):
    with pytest.raises(InputError, match="no celestial WCS"):
        read_image(blank()).pixels(1.0, 2.0)


def test_world_coordinates_come_back(field):
    image = read_image(field[0])
    x, y = image.pixels(*image.sky(np.array([10.0, 400.3]), np.array([7.0, 123.4])))
    np.testing.assert_allclose(x, [10.0, 400.3], atol=1e-6)
    np.testing.assert_allclose(y, [7.0, 123.4], atol=1e-6)
    assert image.scales == pytest.approx([0.06, 0.06])


@pytest.mark.parametrize("angle", [0.0, 30.0, -75.0, 170.0])
def test_position_angles_of_both_parities(tmp_path, angle):
    theta = np.array([0.0, 20.0, 90.0, -70.0, np.nan])
    x, y = np.array([50.0, 99.0, 120.0, 180.0, 99.0]), np.array([99.0, 30.0, 99.0, 150.0, 99.0])
    for parity in (-1, 1):  # east to the left of north, and to the right
        image = turned(tmp_path, parity, angle, name=f"{parity}.fits")
        expected = (angle - parity * (theta - 90)) % 180
        off = (image.position_angle(x, y, theta) - expected + 90) % 180 - 90
        assert np.nanmax(np.abs(off)) < 1e-3
        assert np.isnan(off).tolist() == [False] * 4 + [True]


def test_position_angles_turn_with_the_meridians_at_the_pole(tmp_path):
    image = turned(tmp_path, -1, 0.0, dec=89.9999)
    x, y = np.array([99.0, 20.0, 180.0]), np.array([99.0, 105.0, 107.0])
    found = image.position_angle(x, y, np.full(3, 35.0))
    # Towards the pole is north, wherever one stands.
    pole = np.array(image.pixels(0.0, 90.0))
    north = np.degrees(np.arctan2(pole[1] - y, pole[0] - x))
    assert (found >= 0).all()
    assert (found < 180).all()
    np.testing.assert_allclose(found, (35 - north) % 180, atol=0.01)
    assert np.ptp(found) > 80


@pytest.mark.parametrize("kind", ["u1", "i2", "i4", "f4", "f8"])
@pytest.mark.parametrize("scaled", [False, True])
def test_parts_of_a_plain_image_are_read_as_astropy_reads_them(tmp_path, kind, scaled):
    hdu = fits.ImageHDU(np.random.default_rng(0).uniform(0, 200, (30, 40)).astype(kind))
    if scaled:
        hdu.scale("int16", bzero=100, bscale=0.01)
    fits.HDUList([fits.PrimaryHDU(), hdu]).writeto(tmp_path / "image.fits")
    image = read_image(tmp_path / "image.fits")
    window = slice(3, 30), slice(7, 31)
    with fits.open(tmp_path / "image.fits") as hdus:
        expected = hdus[1].data.astype(np.float32)
    np.testing.assert_array_equal(image.read(window), expected[window])
    np.testing.assert_array_equal(image.data, expected)
    assert image.read(window).dtype.isnative
    image.close()


def test_an_image_that_lost_its_end_meanwhile_is_told(tmp_path):
    fits.writeto(tmp_path / "image.fits", np.ones((60, 60), np.float32))
    image = read_image(tmp_path / "image.fits")
    image.read((slice(0, 20), slice(0, 60)))
    with (tmp_path / "image.fits").open("r+b") as file:
        file.truncate(2880 + 50 * 60 * 4)
    with pytest.raises(InputError, match="cut short"):
        image.read((slice(20, 60), slice(0, 60)))
    image.close()


def test_blocks_of_zeros_are_seen():
    data = np.ones((40, 40), np.float32)
    data[3:7, 3:30] = data[10:40, 5:9] = 0
    assert not without_data(data).any()
    data[7, 10:15] = 0
    assert without_data(data)[7, 10:15].all()
    for dy in range(5):
        for dx in range(5):
            data = np.ones((30, 30), np.float32)
            data[10 + dy : 15 + dy, 11 + dx : 16 + dx] = 0
            assert np.count_nonzero(without_data(data)) == 25
