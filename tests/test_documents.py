"""The code blocks of the documents.

An HTML comment on the line before a block of shell or Python says what is done with it: ``<!-- run -->``, or
``<!-- skip: why -->``. Every `sersicnet` line of a shell block is parsed either way. The blocks of a page run in their
order, in one directory and one Python namespace, where the files of `workplace` are the reader's; sizes are cut.
"""

import contextlib
import itertools
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import pytest
import typer
from astropy.convolution import Gaussian2DKernel
from astropy.io import fits
from astropy.table import QTable, Table

from sersicnet import cli
from sersicnet.errors import SersicnetWarning

ROOT = Path(__file__).parents[1]
RECIPES = sorted(f"howto/{path.stem}" for path in (ROOT / "docs/howto").glob("*.md"))
NAMES = ("index", "tutorial", "gallery", "howto", *RECIPES, "telescopes", "reference", "conventions")
PAGES = ["README.md", *(f"docs/{name}.md" for name in NAMES)]
CUT = {"--n": "16", "--mosaic": "400"}
"""Sizes that options get here."""
BLOCK = re.compile(r"(?:<!-- (?P<mark>[^\n]*) -->\n)?```(?P<language>sh|bash|python)\n(?P<code>.*?)^```$", re.S | re.M)


@dataclass
class Block:
    """A block of a page."""

    where: str
    mark: str
    language: str
    code: str

    @property
    def lines(self):
        """Lines of shell, without comments and empty ones, as lists of words."""
        words = [shlex.split(line, comments=True) for line in self.code.replace("\\\n", " ").splitlines()]
        return [line for line in words if line]


def blocks(page):
    text = (ROOT / page).read_text("utf-8")
    return [
        Block(f"{page}:{text[: m.start('code')].count(chr(10))}", m["mark"] or "", m["language"], m["code"])
        for m in BLOCK.finditer(text)
    ]


def calls(block):
    """The arguments of each call of `sersicnet` in a block of shell."""
    for line in block.lines:
        name, *arguments = [*itertools.dropwhile(lambda word: re.match(r"\w+=", word), line), "&"]
        if name == "sersicnet":
            yield list(itertools.takewhile(lambda word: word not in ("&", "&&", "|", ">"), arguments))


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_run_or_says_why_not(page):
    undecided = [block.where for block in blocks(page) if not re.fullmatch(r"run|skip: \S.*", block.mark)]
    assert undecided == [], "give the line before the block: <!-- run --> or <!-- skip: why -->"


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_one_that_sersicnet_takes(page):
    group = typer.main.get_command(cli.app)
    for block in blocks(page):
        if block.language == "python":
            compile(block.code, block.where, "exec")
            continue
        for arguments in calls(block):
            if arguments in (["--version"], ["--help"]):
                continue
            command = group.commands.get(arguments[0]) if arguments else None
            assert command is not None, f"{block.where}: no command {arguments}"
            try:
                command.make_context(arguments[0], arguments[1:])
            except click.ClickException as error:
                pytest.fail(f"{block.where}: {shlex.join(arguments)}: {error.format_message()}")


@pytest.fixture(scope="module")
def stores(tmp_path_factory, field, small_dataset):
    """What a reader of the how-to has: images with their maps, a PSF, tables and datasets."""
    there = tmp_path_factory.mktemp("stores")
    mosaic, truth = field[0], field[1]
    with fits.open(mosaic) as hdus:
        image = next(hdu for hdu in hdus if hdu.data is not None)
        data, header = image.data.copy(), image.header.copy()
    rms = np.full(data.shape, np.std(data[data < np.median(data)]), np.float32)
    weight = fits.ImageHDU(1 / rms**2, name="WEIGHT")
    fits.HDUList([fits.PrimaryHDU(data, header), weight]).writeto(there / "mosaic.fits")
    fits.writeto(there / "rms.fits", rms)
    fits.writeto(there / "wht.fits", 1 / rms**2)
    fits.writeto(there / "mask.fits", np.zeros(data.shape, np.uint8))
    fits.writeto(there / "image.fits", data)
    for name in ("field-1", "field-2", "goods-n"):
        shutil.copy(mosaic, there / f"{name}.fits")
    finer = header.copy()
    for card in ("CDELT1", "CDELT2", "CD1_1", "CD2_2"):
        if card in finer:
            finer[card] /= 2
    fits.writeto(there / "mosaic_30mas.fits", np.kron(data, np.ones((2, 2), np.float32)) / 4, finer)
    part = data[:300, :300]  # bands, which are measured several times
    for name in ("f160w", "f125w", "f814w"):
        fits.writeto(there / f"{name}.fits", part, fits.Header({**header, "FILTER": name.upper()}))
    fits.writeto(there / "f814w_rms.fits", rms[:300, :300])
    for name in ("psf", "field1", "field2", "field3", "f125w_psf", "f814w_psf"):
        fits.writeto(there / f"{name}.fits", Gaussian2DKernel(1.1, x_size=41, y_size=41).array)
    bright = truth[np.argsort(truth["mag"])[:3]]
    bright["x", "y"].write(there / "positions.csv")
    bright["x", "y"].write(there / "targets.csv")
    truth["x", "y", "mag", "r_eff_pix", "sersic_n", "ellipticity"].write(there / "labels.csv")
    truth["ra", "dec", "mag", "r_eff_pix", "sersic_n", "ellipticity"].write(there / "other.csv")
    Table.read(there / "other.csv").write(there / "other.fits")
    galaxies = Table(
        {name: np.linspace(*ends, 120) for name, ends in {
            "mag": (18.0, 24.0), "r_eff_pix": (3.0, 20.0), "sersic_n": (0.6, 5.0), "ellipticity": (0.1, 0.7),
        }.items()}
    )  # fmt: skip
    galaxies.write(there / "galaxies.csv")
    for name in ("train", "test"):
        shutil.copy(small_dataset, there / f"{name}.h5")
    shutil.copytree(ROOT / "weights/fovea-sim", there / "my-weights")
    with pytest.raises(SystemExit, match="0"):
        cli.main(["measure", str(there / "mosaic.fits"), "-o", str(there / "cat.fits"), "--quiet", "--workers", "1"])
    return there


@pytest.fixture
def workplace(stores, tmp_path, monkeypatch):
    """A copy of `stores` to work in, with ``docs`` beside it; one core, so that no pool of processes is started."""
    place = tmp_path / "work"
    shutil.copytree(stores, place)
    (place / "docs").mkdir()
    shutil.copytree(ROOT / "docs/example", place / "docs/example")
    monkeypatch.chdir(place)
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    monkeypatch.setenv("MPLBACKEND", "agg")


def run_shell(block, capsys):
    arguments_of = calls(block)
    for line in block.lines:
        if line[0] != "sersicnet":
            subprocess.run(line, check=True)
            continue
        arguments = next(arguments_of)
        arguments = [CUT.get(before, word) for before, word in zip(["", *arguments], arguments, strict=False)]
        if "-o" in arguments:  # a reader of several blocks would choose another name
            output = Path(arguments[arguments.index("-o") + 1])
            if output.is_file():
                output.unlink()
            elif output.is_dir() and not arguments[arguments.index("-o") + 1].endswith("/"):
                shutil.rmtree(output)
        capsys.readouterr()
        with pytest.raises(SystemExit) as done:
            cli.main(arguments)
        out, err = capsys.readouterr()
        assert not done.value.code, f"{block.where}: {shlex.join(arguments)}: {err}"
        if ">" in line:
            Path(line[-1]).write_text(out, "utf-8")


def run_python(block, names):
    code = compile(re.sub(r"\b\d\d?_000\b", CUT["--n"], block.code), block.where, "exec")
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore", SersicnetWarning)  # few pixels of blank sky
        exec(code, names)


@pytest.mark.parametrize("page", [page for page in PAGES if any(block.mark == "run" for block in blocks(page))])
def test_the_blocks_of_a_page_run(page, workplace, capsys):
    names = {"__name__": "__main__", "cat": QTable.read("cat.fits")}
    for block in blocks(page):
        if block.mark != "run":
            continue
        if block.language == "python":
            run_python(block, names)
        else:
            run_shell(block, capsys)
