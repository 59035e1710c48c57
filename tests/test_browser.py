"""The pages that sersicnet writes, in a real browser without a network; skipped where there is no Chromium."""

import sys
from pathlib import Path

import pytest
from test_bands import band

import sersicnet
from sersicnet.catalogue.columns import CLASSES, classes
from sersicnet.measuring.bands import Band, measure_bands

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))
import browser

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(browser.find() is None, reason="no Chromium here"),
    pytest.mark.filterwarnings("ignore::sersicnet.errors.SersicnetWarning"),  # no gain, few pixels of blank sky
]

FACTS = """[...document.querySelectorAll("img, svg image")].map(one => [one.getAttribute("alt") ||
one.closest("svg").getAttribute("aria-label"), one.naturalWidth ?? one.width.baseVal.value])"""


@pytest.fixture(scope="module")
def tab():
    with browser.Browser() as one:
        yield one


@pytest.fixture(scope="module")
def measured(field, tmp_path_factory):
    """A report, and the catalogue that it shows."""
    path = tmp_path_factory.mktemp("pages") / "report.html"
    return path, sersicnet.measure(field[0], outputs=sersicnet.Outputs(report=path))


@pytest.fixture(scope="module")
def validated(field, tmp_path_factory):
    """The page of a validation."""
    path = tmp_path_factory.mktemp("pages") / "validation.fits"
    sersicnet.validate(field[0], path, injection=sersicnet.Injection(n=6, mag=(19.0, 22.0), seed=1), gain=3200)
    return path.with_suffix(".html")


@pytest.fixture(scope="module")
def bands(tmp_path_factory):
    """The report of three bands and its catalogue: one band is rotated, and one does not cover all galaxies."""
    path = tmp_path_factory.mktemp("pages")
    made = [
        band(path / "coarse.fits"),
        band(path / "fine.fits", size=620, scale=0.03, angle=35, fwhm=4.0, rms=0.0012, name="F814W", seed=2),
        band(path / "small.fits", size=170, name="F606W", seed=3),
    ]
    outputs = sersicnet.Outputs(report=path / "bands.html")
    given = [Band(exposure=exposure, psf=psf) for exposure, psf, _ in made]
    return path / "bands.html", measure_bands(given, [made[0][0]], outputs=outputs)


def check(tab, page):
    """A page whose pictures are drawn and named, which loads nothing, and is as wide as the window."""
    tab.open(page)
    pictures = tab.value(FACTS)
    assert len(pictures) > 5
    assert [text for text, width in pictures if not text or not width] == []
    assert tab.requests == []
    assert tab.complaints == []
    ids = tab.value('[...document.querySelectorAll("[id]")].map(one => one.id)')
    assert len(set(ids)) == len(ids)
    for width in (1280, 390):  # a telephone's
        tab.resize(width, 800)
        assert tab.value("document.documentElement.scrollWidth") <= width
    tab.resize(1280, 900)


def test_a_page_that_loads_something_or_fails_would_be_noticed(tab, tmp_path):
    page = tmp_path / "page.html"
    page.write_text('<img src="http://127.0.0.1:9/x.png"><script>console.error("no"); throw Error("thrown")</script>')
    tab.open(page)
    assert tab.requests == ["http://127.0.0.1:9/x.png"]
    assert any("no" in line for line in tab.complaints)
    assert any("Uncaught" in line for line in tab.complaints)


def hidden(tab):
    """The layers of sources that do not show."""
    return tab.value(
        '[...document.querySelectorAll(".layer")].filter(one => getComputedStyle(one).display == "none")'
        ".map(one => one.classList[1])"
    )


def test_a_click_on_a_class_of_flags_in_a_report_hides_its_ellipses_and_another_one_shows_them(tab, measured):
    page, catalogue = measured
    check(tab, page)
    kinds = classes(catalogue["flags"])
    here = [k for k in reversed(range(len(CLASSES))) if (kinds == k).any()]
    labels = tab.value('[...document.querySelectorAll("label")].map(one => one.textContent)')
    assert labels == [f"{CLASSES[k].name} ({(kinds == k).sum():,})" for k in here]
    assert hidden(tab) == []
    all_of_it = tab.box(".stack")
    before = tab.picture(all_of_it)
    for number, k in enumerate(here):
        tab.click("label", number)
        assert hidden(tab) == [f"all{k}"]
        assert tab.picture(all_of_it) != before
        tab.click("label", number)
        assert hidden(tab) == []
    assert tab.picture(all_of_it) == before
    for number in range(len(here)):
        tab.click("label", number)
    assert hidden(tab) == [f"all{k}" for k in here]


def test_a_class_of_flags_is_hidden_by_the_keyboard_too(tab, measured):
    tab.open(measured[0])
    tab.value('document.querySelector("input").focus()')
    tab.call("Input.dispatchKeyEvent", type="keyDown", key=" ", code="Space", windowsVirtualKeyCode=32, text=" ")
    tab.call("Input.dispatchKeyEvent", type="keyUp", key=" ", code="Space", windowsVirtualKeyCode=32)
    assert len(hidden(tab)) == 1


def test_ellipses_lie_on_their_image_whatever_the_width_of_the_window(tab, measured):
    tab.open(measured[0])
    for width in (1280, 700, 390):
        tab.resize(width, 800)
        boxes = [tab.box(".stack img", k) for k in range(tab.value('document.querySelectorAll(".stack img").length'))]
        assert all(box == pytest.approx(boxes[0], abs=1) for box in boxes)
    tab.resize(1280, 900)


def test_a_report_of_bands_shows_each_galaxy_in_all_of_them_side_by_side(tab, bands):
    page, catalogue = bands
    check(tab, page)
    rows = tab.value(
        """[...document.querySelectorAll(".grid")].map(grid => [...grid.querySelectorAll(".stamp")].map(one => [
        one.querySelector("b").textContent, one.getBoundingClientRect().top, one.querySelector("svg") != null]))"""
    )
    galaxies = [row for row in rows if row]
    numbers = [row[0][0].split()[0] for row in galaxies]
    assert 5 < len(set(numbers)) == len(numbers) <= len(catalogue)
    for number, row in zip(numbers, galaxies, strict=True):
        assert [name for name, _, _ in row] == [f"{number} {name}" for name in ("F160W", "F814W", "F606W")]
        assert len({top for _, top, _ in row}) == 1
    here = [drawn for row in galaxies for _, _, drawn in row[2:]]
    assert True in here
    assert False in here  # outside of the small image
    explained = tab.value('document.querySelector("section:nth-of-type(2) p").textContent')
    assert "asinh stretch; pixels without data are pale blue. The ellipse is that of the effective radius." in explained
    assert "by the magnitude in F160W; a caption states the values and flags of its band." in explained
    before = tab.picture(tab.box(".grid"))
    tab.click(".stamp svg")  # nothing to be seen, and no error
    assert tab.picture(tab.box(".grid")) == before
    assert tab.complaints == []


def test_a_class_of_flags_is_hidden_in_its_band_alone(tab, bands):
    page, catalogue = bands
    tab.open(page)
    names = tab.value('[...document.querySelectorAll("label")].map(one => one.htmlFor)')
    shown = [
        f"band{k}all{kind}"
        for k, name in enumerate(("F160W", "F814W", "F606W"))
        for kind in sorted(set(classes(catalogue[f"flags_{name}"])), reverse=True)
    ]
    assert [name for name in names if "part" not in name] == shown
    for number, name in enumerate(names):
        tab.click("label", number)
        assert hidden(tab) == [name]
        tab.click("label", number)
    assert hidden(tab) == []
    assert tab.complaints == tab.requests == []


def test_the_page_of_a_validation_shows_its_figures(tab, validated):
    check(tab, validated)
    assert tab.value('document.querySelectorAll("input, button, select, script").length') == 0
    assert tab.value('document.querySelectorAll("h2").length') == 6
