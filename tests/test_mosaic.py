import gzip
import sys

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table
from conftest import turned

from sersicnet.errors import InputError, SersicnetWarning
from sersicnet.image.detect import Detector
from sersicnet.image.exposure import Exposure
from sersicnet.image.mosaic import read_image, read_map
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
    assert read_image(path, kind="wht").data[0, 0] == 1
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


def planes(path, *named, **cards):
    """A file of extensions, each of them filled with its own number, with an empty primary before them."""
    hdus = [fits.PrimaryHDU()]
    for i, (name, more) in enumerate(named, start=1):
        hdus.append(fits.ImageHDU(np.full((20, 20), i, np.float32), fits.Header({**cards, **more}), name=name))
    fits.HDUList(hdus).writeto(path, overwrite=True)
    return path


SURVEY = [
    (None, {"IMAGETYP": kind, "BAND": band}) for band in "gr" for kind in ("image", "invvar", "psf")
]  # fmt: skip


@pytest.mark.parametrize(
    "named",
    [SURVEY, [(f"{kind}_{band}", {}) for band in "gr" for kind in ("IMAGE", "INVVAR", "PSF")]],
    ids=["IMAGETYP and BAND", "EXTNAME"],
)
def test_image_and_weight_of_one_band_are_chosen_by_their_names(tmp_path, named):
    path = planes(tmp_path / "bands.fits", *named)
    with pytest.warns(SersicnetWarning, match=r"holds several images: 1 .*, 4 .*Extension 1 is used; `hdu` chooses"):
        image = read_image(path)
    assert image.data[0, 0] == 1
    assert read_map(path, "wht", image).data[0, 0] == 2
    red = read_image(path, 4)
    assert read_map(path, "wht", red).data[0, 0] == 5
    with pytest.raises(InputError, match="no extension that is named an rms map"):
        read_map(path, "rms", red)


def test_maps_are_no_images_and_images_no_maps(tmp_path):
    path = planes(tmp_path / "both.fits", ("ERR", {}), ("SCI", {}), ("VAR_POISSON", {}), ("VAR_RNOISE", {}))
    image = read_image(path)
    assert image.data[0, 0] == 2
    assert read_map(path, "rms", image).data[0, 0] == 1
    other = planes(tmp_path / "other.fits", ("SCI", {}), ("ERR", {}))
    with pytest.raises(InputError, match="holds no extension that is named an inverse-variance map"):
        read_map(other, "wht", image)
    with pytest.raises(InputError, match="more than one extension that is named a variance map"):
        read_map(path, "var", image)
    with pytest.raises(InputError, match="no extension that is an image by its name; it has 0 PRIMARY, 1 ERR"):
        read_image(planes(tmp_path / "rms.fits", ("ERR", {}), ("DQ", {})))
    with pytest.raises(InputError, match="holds no extension that is named an inverse-variance map"):
        read_map(tmp_path / "rms.fits", "wht", image)


def test_an_extension_without_a_telling_name_is_a_map(tmp_path):
    path = planes(tmp_path / "image.fits", ("SCI", {}))
    image = read_image(path)
    assert read_map(planes(tmp_path / "map.fits", (None, {}), ("X", {})), "rms", image).data[0, 0] == 1
    assert read_map(planes(tmp_path / "copied.fits", ("SCI", {})), "rms", image).data[0, 0] == 1


@pytest.mark.parametrize("primary", [None, np.zeros((0, 0), np.float32), np.zeros(5054, np.uint8), np.ones((2, 2))])
def test_an_empty_primary_is_not_the_image(tmp_path, primary):
    hdus = [fits.PrimaryHDU(primary), fits.ImageHDU(np.full((1, 1, 20, 30), 7, np.int16))]
    fits.HDUList(hdus).writeto(tmp_path / "image.fits")
    image = read_image(tmp_path / "image.fits")
    assert image.shape == (20, 30)
    assert (image.read((slice(3, 8), slice(2, 20))) == np.full((5, 18), 7)).all()
    with fits.open(tmp_path / "image.fits") as opened:
        assert Exposure.of(opened, zero_point=25.0).shape == (20, 30)


def test_a_mask_with_a_plane_of_the_sources_is_told(tmp_path):
    """Rubin and HSC mark each detected source in their masks, and all pixels that are not zero are ignored."""
    image = read_image(planes(tmp_path / "image.fits", ("IMAGE", {})))
    path = planes(tmp_path / "calexp.fits", ("IMAGE", {}), ("MASK", {"HIERARCH MP_DETECTED": 5, "MP_BAD": 0}))
    with pytest.warns(SersicnetWarning, match=r"calexp.fits\[2\] has a bit for each of several planes"):
        read_map(path, "mask", image)


def test_planes_of_one_pixel_are_dropped_however_the_file_is_compressed(tmp_path):
    data = np.random.default_rng(0).normal(0, 1, (1, 30, 40)).astype(np.float32)
    fits.writeto(tmp_path / "a.fits", data)
    (tmp_path / "a.fits.gz").write_bytes(gzip.compress((tmp_path / "a.fits").read_bytes()))
    fits.HDUList([fits.PrimaryHDU(), fits.CompImageHDU(data)]).writeto(tmp_path / "a.fits.fz")
    for name in ("a.fits", "a.fits.gz", "a.fits.fz"):
        np.testing.assert_allclose(read_image(tmp_path / name).data, data[0], atol=0.1)


def test_the_input_of_a_cube_of_galfit_is_used(tmp_path):
    named = [
        (None, {"OBJECT": "n[1:20]"}),
        (None, {"OBJECT": "model", "CONVBOX": "100, 100", "FITSECT": "[1:20,1:20]", "MAGZPT": 25.0}),
        (None, {"OBJECT": "residual map"}),
    ]
    with pytest.warns(SersicnetWarning, match="was written by GALFIT: extension 1, its input, is used"):
        assert read_image(planes(tmp_path / "imgblock.fits", *named)).data[0, 0] == 1
    with pytest.raises(InputError, match="no extension that is an image by its name"):
        read_image(planes(tmp_path / "model.fits", named[1]))


def test_an_extension_has_a_version(tmp_path):
    path = tmp_path / "chips.fits"
    chips = [fits.ImageHDU(np.full((20, 20), i, np.int16), name="SCI", ver=i) for i in (1, 2)]
    fits.HDUList([fits.PrimaryHDU(), *chips]).writeto(path)
    assert read_image(f"{path}[SCI,2]").data[0, 0] == 2


TAN = {
    "CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CRVAL1": 150.1, "CRVAL2": 2.2, "CRPIX1": 100.5, "CRPIX2": 100.5,
    "CDELT1": -0.06 / 3600, "CDELT2": 0.06 / 3600, "MAGZERO": 25.0,
}  # fmt: skip
SIP = {"CTYPE1": "RA---TAN-SIP", "CTYPE2": "DEC--TAN-SIP", "A_ORDER": 2, "B_ORDER": 2}


def with_wcs(blank, **cards):
    return read_image(blank("wcs.fits", {**TAN, **cards}, np.zeros((200, 200), np.float32)))


def test_distortion_is_used_only_where_it_holds(blank, tmp_path):
    plain = with_wcs(blank).sky(0.0, 0.0)

    def off(image):
        return np.hypot(*np.subtract(image.sky(0.0, 0.0), plain)) * 3600 / 0.06

    terms = {"A_2_0": 1e-4, "B_0_2": 1e-4}
    (tmp_path / "wcs.fits").unlink()
    assert off(with_wcs(blank, **SIP, **terms)) > 1
    for cards, message in (
        ({"A_ORDER": 2, "B_ORDER": 2, **terms}, "SIP distortion is left out, because CTYPE does not end in -SIP"),
        ({**SIP, "A_2_0": 1.0}, "SIP distortion cannot be used .it does not lead from the corners"),
        ({**SIP, "B_ORDER": "x", **terms}, "SIP distortion cannot be used"),
        ({"CPDIS1": "LOOKUP", "D2IMDIS1": "LOOKUP"}, "distortion by a look-up table is left out"),
    ):
        (tmp_path / "wcs.fits").unlink()
        image = with_wcs(blank, **cards)
        assert off(image) == pytest.approx(0, abs=1e-6)
        with pytest.warns(SersicnetWarning, match=message):
            image.check_wcs()


def test_positions_far_from_a_distorted_image_are_unknown(blank):
    image = with_wcs(blank, **SIP, A_2_0=2e-5, B_0_2=2e-5)
    ra, dec = np.array([150.1, 150.5, 170, 330.1, np.inf, 1e300]), np.array([2.2, 2.6, 10, -2.2, 2.2, 2.2])
    x, y = image.pixels(ra, dec)
    assert np.isfinite(x).tolist() == np.isfinite(y).tolist() == [True] + 5 * [False]
    x, y = image.pixels(*image.sky(np.array([0, 199.0, -40]), np.array([0, 3.0, 220])))
    np.testing.assert_allclose(x, [0, 199, -40], atol=1e-3)
    assert np.isnan(image.sky(np.array([1e9, np.inf, 1e308]), np.zeros(3))[0]).all()


def test_two_pixel_scales_in_a_header_are_refused(blank, tmp_path):
    for cards, message in (
        ({"PC1_1": 2.0, "PC2_2": 2.0}, "0.06 arcsec by CDELT, 0.12 by CDELT and PC"),
        ({"PC1_1": -0.06 / 3600, "PC2_2": 0.06 / 3600}, "has a PC matrix that is no rotation"),
        (
            {"PC1_1": 1.0, "PC2_2": 1.0, "CD1_1": -0.03 / 3600, "CD2_2": 0.03 / 3600},
            "holds both a PC and a CD matrix; pixels are 0.06 arcsec by PC and CDELT, 0.03 by CD",
        ),
    ):
        with_wcs(blank, **cards)
        with pytest.raises(InputError, match=f"{message}.* or give `pixel_scale`"):
            Exposure.open(tmp_path / "wcs.fits")
        exposure = Exposure.open(tmp_path / "wcs.fits", pixel_scale=0.06)
        assert exposure.pixel_scale.value == 0.06
        assert exposure.wcs is None or exposure.image.scales == pytest.approx([0.06, 0.06])
        (tmp_path / "wcs.fits").unlink()


@pytest.mark.parametrize(
    "cards",
    [
        {"PC1_1": 0.8, "PC1_2": -0.6, "PC2_1": 0.6, "PC2_2": 0.8},
        {"CDELT1": 1.0, "CDELT2": 1.0, "PC1_1": -0.06 / 3600, "PC2_2": 0.06 / 3600},
        {"CD1_1": -0.06 / 3600, "CD2_2": 0.06 / 3600, "CDELT1": 1.0, "CDELT2": 1.0},
        {"PC1_1": 1.0, "PC2_2": 1.0, "CD1_1": -0.06 / 3600, "CD2_2": 0.06 / 3600},
    ],
)
def test_other_ways_to_write_a_pixel_scale_are_no_contradiction(blank, cards):
    image = with_wcs(blank, **cards)
    image.check_wcs()
    assert image.scales == pytest.approx([0.06, 0.06])


def test_names_of_files_are_printable(tmp_path):
    path = tmp_path / "a\tb\udcff.fits"
    fits.writeto(path, np.zeros((20, 20)))
    assert read_image(path).name.endswith("a\\tb\\udcff.fits[0]")


def roman(path, **more):
    asdf = pytest.importorskip("asdf")
    data = np.random.default_rng(0).normal(0, 1, (40, 50)).astype(np.float32)
    photometry = {"conversion_megajanskys": 0.5, "pixel_area": 2.8e-13}
    tree = {"roman": {"data": data, "err": np.ones_like(data), "meta": {"photometry": photometry}, **more}}
    asdf.AsdfFile(tree).write_to(path)
    return data


def test_images_of_roman_are_read(tmp_path):
    path = tmp_path / "r.asdf"
    data = roman(path)
    exposure = Exposure.open(path, noise=path)
    np.testing.assert_allclose(exposure.image.data, 0.5 * data, rtol=1e-6)
    assert exposure.noise.data[0, 0] == 0.5
    assert exposure.zero_point.value == pytest.approx(-6.10 - 2.5 * np.log10(2.8e-13), abs=1e-6)
    assert exposure.pixel_scale.value == pytest.approx(0.109, abs=0.001)
    assert exposure.pixel_scale.source == "PIXAR_SR"
    with pytest.raises(InputError, match="holds no array weight; it has data, err"):
        Exposure.open(path, noise=path, noise_kind="wht")


def test_a_mosaic_of_roman_has_a_wcs(tmp_path):
    info = {"pixel_scale": 0.055, "ra_ref": 270.0, "dec_ref": 66.0, "x_ref": 24.5, "y_ref": 19.5}
    meta = {"photometry": {"conversion_megajanskys": 0.5, "pixel_area": 7.1e-14}}
    meta["wcsinfo"] = info | {"rotation_matrix": [[-1.0, 0.0], [0.0, 1.0]]}
    data = roman(tmp_path / "r.asdf", weight=np.ones((40, 50), np.float32), meta=meta)
    exposure = Exposure.open(tmp_path / "r.asdf")
    np.testing.assert_array_equal(exposure.image.data, data)
    assert exposure.pixel_scale.value == pytest.approx(0.055)
    np.testing.assert_allclose(exposure.image.sky(24.5, 19.5), (270, 66), atol=1e-9)


def test_a_damaged_asdf_file_is_one_line(tmp_path):
    pytest.importorskip("asdf")
    (tmp_path / "r.asdf").write_bytes(b"#ASDF 1.0.0\nfoo")
    with pytest.raises(InputError, match=r"not a readable ASDF file|holds no image of Roman"):
        read_image(tmp_path / "r.asdf")


def test_asdf_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "asdf", None)
    (tmp_path / "r.asdf").write_bytes(b"")
    with pytest.raises(InputError, match=r"needs the package asdf: pip install 'sersicnet\[roman\]'"):
        read_image(tmp_path / "r.asdf")
