"""Draw the pictures of the documentation that show real images, and execute the notebook of a real field.

``python docs/pictures.py DATA`` draws all of them, and ``python docs/pictures.py DATA NAME ...`` those of some names::

    tutorial    docs/images/tutorial-*.png
    gallery     docs/images/gallery-*.png, with Chromium, and with ds9 under Xvfb (Debian: chromium, saods9, xvfb,
                imagemagick); what is not installed is left out
    fields      docs/images/candels.png, xdf.png, abell2744.png
    example     docs/images/example.png, which needs no DATA
    bands       docs/images/bands.png
    notebook    docs/notebooks/hst.ipynb is executed in place

DATA holds public cut-outs: ``candels/gdn_H.gf7220.fits`` (GOODS-N in F160W, whose mosaic is at MAST),
``xdf/xdf_hst_wfc3ir_60mas_f160w_sci.fits``, ``abell2744/abell_2744_cd_galaxy_f105w.fits.gz``, and
``instruments/decals_g.fits`` with ``r`` and ``z`` and their PSFs (Legacy Surveys).
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import browser
import draw
import numpy as np
from astropy.io import fits
from matplotlib import pyplot as plt
from PIL import Image

import sersicnet
from sersicnet.catalogue.figures import show_signal
from sersicnet.image.sky import estimate_sky
from sersicnet.measuring.scene import DETECTOR

DOCS = Path(__file__).resolve().parent
IMAGES = DOCS / "images"
MOST = 400_000
"""Largest size of a picture, bytes."""

GOODS_N = "candels/gdn_H.gf7220.fits"
SMOOTH, SPIRAL, KNOT = (145.1, 43.7), (83.8, 156.8), (115.6, 162.8)
"""Places of galaxies of the field."""


def field(data: Path, work: Path) -> Path:
    """The field of the tutorial: the image alone of a file that holds GALFIT's results as well."""
    path = work / "goods-n.fits"
    if not path.exists():
        with fits.open(data / GOODS_N) as hdus:
            fits.writeto(path, hdus[0].data, hdus[0].header)
    return path


def save(png: bytes, name: str) -> None:
    """Write a picture into the docs, with fewer colours if it would be too large; a palette may merge rare ones."""
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    for colours in (None, 256, 128, 64):
        buffer = io.BytesIO()
        reduced = picture if colours is None else picture.quantize(colours, dither=Image.Dither.NONE)
        reduced.save(buffer, "png", optimize=True)
        if buffer.tell() < MOST:
            break
    (IMAGES / name).write_bytes(buffer.getvalue())
    size = f"{buffer.tell() // 1000} kB, {picture.width} x {picture.height}"
    print(f"docs/images/{name}: {size}{'' if colours is None else f', {colours} colours'}")


def save_figure(figure: plt.Figure, name: str, dpi: int = 100) -> None:
    """Write a figure into the docs."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=dpi)
    plt.close(figure)
    save(buffer.getvalue(), name)


def at(catalogue: sersicnet.Catalogue, place: tuple[float, float]) -> int:
    """The id of the source nearest to a place."""
    return int(catalogue["id"][np.argmin(np.hypot(catalogue["x"].value - place[0], catalogue["y"].value - place[1]))])


# --- the tutorial ---


def tutorial(data: Path, work: Path) -> None:
    """The pictures of each step."""
    path = field(data, work)
    exposure = sersicnet.Exposure.of(path)
    mesh = estimate_sky(exposure, DETECTOR.threshold)
    signal = (exposure.read(exposure.image.whole).data - np.median(mesh.level)) / np.median(mesh.rms)
    figure, axes = plt.subplots(figsize=(5, 5), layout="constrained")
    show_signal(axes, signal)
    axes.set(xlabel="x [pixels]", ylabel="y [pixels]")
    save_figure(figure, "tutorial-field.png")

    catalogue = sersicnet.measure(path)
    save_figure(catalogue.psf.plot()[0].figure, "tutorial-psf.png")
    save_figure(catalogue.plot().figure, "tutorial-sources.png")
    refined = sersicnet.measure(path, refine=sersicnet.Fitting(gain=3000.0))
    for name, table in (("network", catalogue), ("fit", refined)):
        figure, axes = plt.subplots(3, 4, figsize=(10, 7.8), layout="constrained")
        for row, place in zip(axes, (SMOOTH, SPIRAL, KNOT), strict=True):
            table.galaxy(at(table, place)).plot(row)
        save_figure(figure, f"tutorial-{name}.png", 80)
    bad = catalogue[[list(catalogue["id"]).index(at(catalogue, place)) for place in (SMOOTH, SPIRAL, KNOT)]]
    bad["id", "mag", "mag_err", "r_eff", "r_eff_err", "sersic_n", "sersic_n_err", "flags"].pprint(max_width=150)
    refined[[list(refined["id"]).index(at(refined, place)) for place in (SMOOTH, SPIRAL, KNOT)]][
        "id", "mag", "mag_err", "r_eff", "r_eff_err", "sersic_n", "sersic_n_err", "chi2", "flags"
    ].pprint(max_width=150)


# --- the gallery ---


def gallery(data: Path, work: Path) -> None:
    """Screenshots of pages, and of ds9."""
    path = field(data, work)
    report, regions, checked = work / "report.html", work / "cat.reg", work / "validation.fits"
    if not report.exists():
        outputs = sersicnet.Outputs(catalogue=work / "cat.fits", report=report, regions=regions)
        sersicnet.measure(path, refine=sersicnet.Fitting(gain=3000.0), outputs=outputs)
    if not checked.exists():
        injection = sersicnet.Injection(n=300, mag=(20.0, 26.5), seed=1)
        sersicnet.validate(path, checked, injection=injection, gain=3000.0)
    with skipped(FileNotFoundError), browser.Browser(1100, 900) as tab:
        tab.open(report)
        save(sections(tab, 0, 1), "gallery-report-head.png")
        save(sections(tab, 1, 2), "gallery-report.png")
        save(sections(tab, 4, 5), "gallery-report-galaxies.png")
        tab.open(checked.with_suffix(".html"))
        save(sections(tab, 0, 2), "gallery-validation.png")
        save(sections(tab, 2, 4), "gallery-validation-errors.png")
        page = DOCS / "_build" / "html" / "notebooks" / "hst.html"
        if page.exists():
            tab.open(page)
            tab.value("document.body.dataset.theme = 'light'")
            left, top, width, _ = tab.box("#measure")
            save(tab.picture((left - 10, top, width + 20, 1250)), "gallery-notebook.png")
    with skipped(FileNotFoundError):
        save(ds9(path, regions), "gallery-ds9.png")


def sections(tab: browser.Browser, first: int, end: int) -> bytes:
    """The sections of a page from one number to another, each of which has a heading; the first one is its head."""
    tops = [tab.box("section", number)[1] for number in (first, end)]
    return tab.picture((0, tops[0], 1100, tops[1] - tops[0]))


@contextlib.contextmanager
def skipped(kind: type[Exception]):
    """Go on without a program that is not installed."""
    try:
        yield
    except kind as error:
        print(f"left out: {error}", file=sys.stderr)


def ds9(image: Path, regions: Path, display: str = ":93") -> bytes:
    """The window of ds9 with an image and regions, on a display of its own."""
    for program in ("Xvfb", "ds9", "import"):
        if shutil.which(program) is None:
            raise FileNotFoundError(f"{program} is not installed.")
    environment = {**os.environ, "DISPLAY": display, "HOME": str(regions.parent.resolve())}
    drawn, window = (
        regions.with_name("drawn.reg"),
        regions.with_name("window.png"),
    )  # the last it does is to save regions
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment}
    server = subprocess.Popen(["Xvfb", display, "-screen", "0", "1000x900x24"], **quiet)
    try:
        time.sleep(5)
        options = "-geometry 1000x900+0+0 -scale asinh -scale limits -0.005 0.2 -cmap grey -cmap invert yes"
        shown = ["-regions", regions, "-zoom", "to", "fit", "-regions", "save", drawn]
        program = subprocess.Popen(["ds9", *options.split(), image, *shown], **quiet)
        try:
            for _ in range(120):
                if drawn.exists():
                    break
                time.sleep(1)
            time.sleep(5)
            subprocess.run(["import", "-window", "root", window], check=True, **quiet)
        finally:
            program.terminate()
            program.wait()
    finally:
        server.terminate()
        server.wait()
    return window.read_bytes()


# --- other pages ---


def fields(data: Path, work: Path) -> None:
    """Detections over real images."""
    xdf, cluster = "xdf/xdf_hst_wfc3ir_60mas_f160w_sci.fits", "abell2744/abell_2744_cd_galaxy_f105w.fits.gz"
    for name, source, options in (
        ("candels", field(data, work), {}),
        ("xdf", data / xdf, {"zero_point": 25.9463}),
        ("abell2744", data / cluster, {}),
    ):
        overlaid(source, name, work, **options)


def example(_: Path, work: Path) -> None:
    """The picture of the README."""
    overlaid(DOCS / "example" / "mosaic.fits", "example", work)


def overlaid(source: Path, name: str, work: Path, **options: float) -> None:
    """Measure an image, and draw the catalogue over it."""
    catalogue, figure = work / f"{name}_cat.fits", work / f"{name}.png"
    sersicnet.measure(source, outputs=sersicnet.Outputs(catalogue=catalogue, overwrite=True), **options)
    draw.draw(source, catalogue, figure)
    save(figure.read_bytes(), f"{name}.png")


def bands(data: Path, work: Path) -> None:
    """Radii, indices and colours in two bands."""
    folder = data / "instruments"
    images = {band: sersicnet.Exposure.of(folder / f"decals_{band}.fits") for band in "grz"}
    given = [
        sersicnet.Band(exposure=images[band], psf=folder / f"decals_{band}_psf.fits", name=band) for band in ("g", "z")
    ]
    path = work / "bands.fits"
    sersicnet.measure_bands(
        given, [images["r"]], refine=sersicnet.Fitting(), outputs=sersicnet.Outputs(catalogue=path, overwrite=True)
    )
    draw.bands(path, work / "bands.png")
    save((work / "bands.png").read_bytes(), "bands.png")


def notebook(data: Path, work: Path) -> None:
    """Execute the notebook of a real field, and keep its outputs."""
    path = DOCS / "notebooks" / "hst.ipynb"
    path.write_text(executed(path, data, work), "utf-8")
    print(f"{path}: {path.stat().st_size // 1000} kB")


def executed(path: Path, data: Path, work: Path) -> str:
    """A notebook with the outputs that it has in a folder of its own, as JSON."""
    import nbformat
    from nbclient import NotebookClient

    link(data, work / "files")
    place = (work / "notebook").resolve()
    place.mkdir()
    book = nbformat.read(path, as_version=4)
    os.environ["SERSICNET_FILES"] = str((work / "files").resolve())
    NotebookClient(book, timeout=3000, kernel_name="python3", resources={"metadata": {"path": str(place)}}).execute()
    for cell in book.cells:
        cell.metadata = {}  # no times of execution
    for kind in ("kernelspec", "language_info"):
        book.metadata[kind] = {"name": "python3" if kind == "kernelspec" else "python"}
    book.metadata["kernelspec"].update(display_name="Python 3", language="python")
    return nbformat.writes(book, indent=1) + "\n"


def link(data: Path, folder: Path) -> None:
    """Put the files into a folder under the names that the notebook looks for."""
    folder.mkdir()
    (folder / "goods-n-mosaic.fits").symlink_to((data / GOODS_N).resolve())
    for band in "grz":
        for ours, theirs in ((f"legacy-{band}", f"decals_{band}"), (f"legacy-{band}-psf", f"decals_{band}_psf")):
            (folder / f"{ours}.fits").symlink_to((data / "instruments" / f"{theirs}.fits").resolve())


PICTURES = {one.__name__: one for one in (tutorial, notebook, gallery, fields, example, bands)}


if __name__ == "__main__":
    images = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as there, contextlib.chdir(there):  # pages show names without folders
        for name in sys.argv[2:] or PICTURES:
            PICTURES[name](images, Path())
