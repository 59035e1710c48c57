import numpy as np
import pytest
from astropy.stats import SigmaClip, mad_std
from photutils.background import MADStdBackgroundRMS, SExtractorBackground
from skimage.segmentation import expand_labels
from threadpoolctl import threadpool_limits

from sersicnet.engine.render import Renderer
from sersicnet.errors import SersicnetWarning
from sersicnet.image import sky
from sersicnet.image.pixels import Held, Pixels, correlation, grown, median
from sersicnet.image.regions import Threshold, dilated
from sersicnet.image.sky import REACH, Mesh, _binned, _clipped, _mad_std, _products, _sky_of, estimate_sky


def test_sky_and_noise_of_a_pixel_do_not_depend_on_the_window(held, mesh):
    everything, part = (slice(0, 512), slice(0, 512)), (slice(101, 307), slice(33, 350))
    whole, inner = (mesh.at(window, held.read(window)) for window in (everything, part))
    np.testing.assert_array_equal(inner.level, whole.level[part])
    np.testing.assert_array_equal(inner.rms, whole.rms[part])
    smooth = Threshold().smooth
    wide = grown(part, Threshold().halo, held.shape)
    np.testing.assert_array_equal(
        smooth(held.pixels.data[wide], held.pixels.bad[wide])[7:-7, 7:-7],
        smooth(held.pixels.data, held.pixels.bad)[wide][7:-7, 7:-7],
    )


def test_a_mesh_follows_a_sloping_sky():
    rng = np.random.default_rng(0)
    y, x = np.indices((700, 900))
    slope = (0.004 * x - 0.002 * y + 5).astype(np.float32)
    data = slope + rng.normal(0, 1 + x / 900, x.shape).astype(np.float32)
    held = Held(Pixels(data, np.zeros(data.shape, bool)))
    window = slice(0, 700), slice(0, 900)
    sky = estimate_sky(held, Threshold()).at(window, held.pixels)
    inner = slice(150, -150), slice(150, -150)
    assert np.abs(sky.level - slope)[inner].max() < 0.12
    assert np.abs(sky.rms / (1 + x / 900) - 1)[inner].max() < 0.06
    assert np.abs(sky.level - slope).max() < 0.6  # half a box's step of the slope, in the corners


def test_a_box_full_of_a_source_takes_the_sky_from_around():
    rng = np.random.default_rng(0)
    data = rng.normal(3, 1, (640, 640)).astype(np.float32)
    y, x = np.indices(data.shape) - 320.0
    data += (200 * np.exp(-np.hypot(x, y) / 25)).astype(np.float32)
    held = Held(Pixels(data, np.zeros(data.shape, bool)))
    mesh = estimate_sky(held, Threshold())
    assert isinstance(mesh, Mesh)
    assert mesh.level == pytest.approx(3, abs=0.25)
    assert mesh.rms == pytest.approx(1, abs=0.1)


def test_the_wings_of_galaxies_are_hardly_taken_for_sky():
    data = np.random.default_rng(0).normal(3, 1, (640, 640)).astype(np.float32)
    draw = Renderer(np.ones((1, 1)), 640)
    for x, y in ((200, 200), (200, 440), (440, 200), (440, 440)):
        data += draw(np.array([[x, y, 30000, 15, 3, 0.7, 30]]))[0]
    mesh = estimate_sky(Held(Pixels(data, np.zeros(data.shape, bool))), Threshold())
    assert mesh.level.mean() == pytest.approx(3, abs=0.03)
    assert mesh.level.max() < 3.06


def test_a_galaxy_that_nearly_fills_the_image_leaves_a_sky():
    rng = np.random.default_rng(0)
    data = rng.normal(3, 1, (192, 192)).astype(np.float32)
    y, x = np.indices(data.shape) - 95.5
    data += np.where(np.hypot(x, y) < 72, 20, 0).astype(np.float32)
    mesh = estimate_sky(Held(Pixels(data, np.zeros(data.shape, bool))), Threshold())
    assert mesh.level == pytest.approx(3, abs=0.5)


def test_a_mask_grows_by_a_disc():
    inside = np.random.default_rng(0).random((60, 50)) > 0.995
    for reach in (1, 2, 8):
        np.testing.assert_array_equal(dilated(inside, reach), expand_labels(inside.astype(int), reach) > 0)


@pytest.mark.parametrize("n", [1, 2, 7, 1000])
def test_medians_are_those_of_numpy(n):
    values = np.random.default_rng(n).standard_normal(n).astype(np.float32)
    assert median(values) == np.median(values)
    assert _mad_std(values) == mad_std(values)


@pytest.fixture(scope="module")
def boxes():
    rng = np.random.default_rng(0)
    values = (rng.standard_normal((40, 4001)) + rng.exponential(0.5, (40, 4001)) ** 3 + 100).astype(np.float32)
    values[:10] = np.round(values[:10], 1)
    values[11], values[12, :2100], values[13] = 7.5, 1.5, rng.standard_normal(4001)
    return [*values, *values[:20, :4000], values[0, :3], values[0, :1]]


def test_outliers_are_clipped_as_by_astropy(boxes):
    for values in boxes:
        expected = SigmaClip(3.0, maxiters=10)(values, masked=False)
        kept, mean, std = _clipped(values)
        np.testing.assert_array_equal(kept, np.sort(expected))
        assert (mean, std) == pytest.approx((expected.mean(dtype=float), expected.std(dtype=float)), rel=1e-6, abs=1e-6)


def test_sky_of_boxes_is_that_of_photutils(boxes):
    clip = SigmaClip(3.0, maxiters=10)
    for values in boxes:
        level, rms = _sky_of(values)
        if len(values) > 1000 and len(np.unique(values)) < len(values) / 2:
            continue  # quantised: the median deviation is a multiple of a step
        assert rms == pytest.approx(MADStdBackgroundRMS(sigma_clip=clip).calc_background_rms(values), rel=1e-6)
        if len(values) > 1000:
            expected = SExtractorBackground(sigma_clip=clip).calc_background(values)
            assert level == pytest.approx(expected, abs=0.1 * rms)


@pytest.mark.parametrize("step", [0.06, 1 / 7, 1 / 2])
def test_the_sky_of_quantised_values_is_that_of_the_values(step):
    """A median of quantised values is one of them, and the mode of medians 2.5 times as far off as it."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        values = rng.normal(rng.uniform(-1, 1), 1, 8192).astype(np.float32)
        steps = step * np.repeat(rng.normal(1, 0.01, 64), 128)  # of rows, as in compressed images
        quantised = (np.round(values / steps) * steps).astype(np.float32)
        assert _sky_of(quantised)[0] == pytest.approx(_sky_of(values)[0], abs=0.04)


@pytest.mark.parametrize("step", [0.02, 0.1, 0.3, 0.56, 0.83, 1, 1.25, 1.5, 1.75, 2])
def test_the_noise_of_quantised_values_is_their_scatter(step):
    """A median absolute deviation is a multiple of the step: up to 20 % too large or too small."""
    rng = np.random.default_rng(0)
    level, noise = [], []
    for phase in np.linspace(0, 1, 20, endpoint=False):
        values = rng.normal(phase * step, 1, 16384)
        found = _sky_of((np.round(values / step) * step).astype(np.float32))
        level.append(found[0] - phase * step)
        noise.append(found[1] / np.hypot(1, step / np.sqrt(12)))
    assert np.mean(noise) == pytest.approx(1, abs=0.01)
    assert noise == pytest.approx(np.ones(20), abs=0.03)
    assert level == pytest.approx(np.zeros(20), abs=0.06)


@pytest.mark.parametrize("step", [0, 0.83, 1.5])
def test_the_correlation_of_quantised_noise_is_that_of_the_noise(step):
    values = np.random.default_rng(0).normal(0.4, 1, (300, 300))
    data = (np.round(values / step) * step if step else values).astype(np.float32)
    found = estimate_sky(Held(Pixels(data, np.zeros(data.shape, bool), np.ones_like(data))), Threshold())
    assert correlation(found.autocorrelation) == pytest.approx(1, abs=0.05)
    assert found.map_factor == pytest.approx(data.std(), rel=0.025)


def test_pixels_of_a_thousand_million_do_not_harm_the_sky():
    rng = np.random.default_rng(40)
    data = rng.normal(0, 0.004, (256, 256)).astype(np.float32)
    data[rng.integers(0, 256, 40), rng.integers(0, 256, 40)] = 1e9 * rng.uniform(0.5, 1, 40)
    found = estimate_sky(Held(Pixels(data, np.zeros(data.shape, bool))), Threshold())
    assert found.rms == pytest.approx(0.004, rel=0.06)
    assert found.level == pytest.approx(0, abs=4e-4)


def test_an_image_in_a_wide_frame_without_data_has_a_sky():
    data = np.full((700, 700), np.nan, np.float32)
    data[310:380, 300:370] = np.random.default_rng(0).normal(5, 2, (70, 70))
    found = estimate_sky(Held(Pixels(data, ~np.isfinite(data))), Threshold())
    assert found.rms == pytest.approx(2, rel=0.1)
    assert found.level == pytest.approx(5, abs=0.3)


def test_an_image_full_of_cosmic_rays_has_a_sky():
    rng = np.random.default_rng(0)
    data = rng.normal(5, 2, (200, 200)).astype(np.float32)
    rays = rng.integers(0, 200, (1200, 2))
    data[rays[:, 0], rays[:, 1]] += rng.uniform(50, 5000, 1200)
    found = estimate_sky(Held(Pixels(data, np.zeros(data.shape, bool))), Threshold())
    assert found.rms == pytest.approx(2, rel=0.15)
    assert found.level == pytest.approx(5, abs=0.6)


def test_an_image_without_any_blank_pixel_is_measured_with_a_warning(monkeypatch):
    data = np.random.default_rng(0).normal(5, 2, (150, 150)).astype(np.float32)
    monkeypatch.setattr(sky, "_covered", lambda pixels, *_: np.ones(pixels.bad.shape, bool))
    with pytest.warns(SersicnetWarning, match="no blank sky"):
        found = estimate_sky(Held(Pixels(data, np.zeros(data.shape, bool))), Threshold())
    assert found.level == pytest.approx(5, abs=0.3)


def test_the_sky_scatters_less_than_by_medians():
    rng = np.random.default_rng(0)
    boxes = rng.normal(0, 1, (200, 4096)).astype(np.float32)
    boxes[:, :200] += rng.exponential(2, (200, 200)).astype(np.float32)
    ours = np.array([_sky_of(box)[0] for box in boxes])
    theirs = [SExtractorBackground(sigma_clip=SigmaClip(3.0, maxiters=10)).calc_background(box) for box in boxes]
    assert ours.std() < 0.85 * np.std(theirs)
    assert ours.mean() == pytest.approx(np.mean(theirs), abs=0.005)


def test_a_large_mosaic_may_be_empty_over_whole_windows():
    data = np.random.default_rng(0).normal(0, 1, (2304, 2304)).astype(np.float32)
    data[:600, :700] = np.nan
    found = estimate_sky(Held(Pixels(data, ~np.isfinite(data))), Threshold())
    np.testing.assert_allclose(np.median(found.rms), 1, atol=0.02)


@pytest.mark.parametrize("shape", [(6, 8), (5, 7)])
@pytest.mark.parametrize("some_bad", [False, True])
def test_blocks_are_means_of_usable_pixels(shape, some_bad):
    data = np.random.default_rng(0).normal(0, 1, shape).astype(np.float32)
    data[:2, 2:4] = np.where(some_bad, np.nan, 1)
    data[3, 0] = np.where(some_bad, np.inf, 1)
    bad = ~np.isfinite(data)
    light, empty = _binned(Pixels(data, bad))
    for (i, j), value in np.ndenumerate(light):
        block = (slice(2 * i, 2 * i + 2), slice(2 * j, 2 * j + 2))
        usable = data[block][~bad[block]]
        assert empty[i, j] == (len(usable) == 0)
        assert value == pytest.approx(usable.mean() if len(usable) else 0, abs=1e-6)


def test_products_are_those_of_pairs_of_blank_pixels():
    rng = np.random.default_rng(0)
    values, used = rng.normal(0, 1, (20, 30)), rng.random((20, 30)) > 0.3
    found = _products(values, used)
    clean = np.where(used, values - np.median(values[used]), 0)
    for dy in range(-REACH, REACH + 1):
        for dx in range(-REACH, REACH + 1):
            pairs = [(y, x) for y, x in np.ndindex(20, 30) if 0 <= y + dy < 20 and 0 <= x + dx < 30]
            total = sum(clean[y, x] * clean[y + dy, x + dx] for y, x in pairs)
            number = sum(used[y, x] and used[y + dy, x + dx] for y, x in pairs)
            assert found[:, REACH + dy, REACH + dx] == pytest.approx([total, number])


def test_no_bit_of_the_sky_depends_on_the_threads_of_blas():
    data = np.random.default_rng(0).normal(0, 1, (400, 390)).astype(np.float32)
    source = Held(Pixels(data, np.zeros(data.shape, bool)))
    found = []
    for threads in (1, 2):
        with threadpool_limits(threads):
            found.append(estimate_sky(source, Threshold()).arrays())
    for name, values in found[0].items():
        np.testing.assert_array_equal(values, found[1][name], err_msg=name)
