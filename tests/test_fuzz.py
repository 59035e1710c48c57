"""Mutated images: each gives a readable catalogue, or one line; none hangs, takes gigabytes, or ends in a traceback.

By hand, ``SERSICNET_MUTATIONS=5000 python -m pytest tests/test_fuzz.py`` tries more of them.
"""

import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path

import numpy as np
from astropy.io import fits

MUTATIONS = int(os.environ.get("SERSICNET_MUTATIONS", "200"))
SECONDS = 10
MEMORY = 4 << 30
"""Address space of the process that measures all mutations, bytes."""

SIDE = 40
VALUES = (
    "0", "-1", "1", "2", "13", "-32", "-64", "8", "16", "999", "99999999", "-99999999999", "1E308", "-1E-308", "NaN",
    "'NaN'", "Inf", "1.0.0", "''", "'", "'abc'", "T", "F", "(1.0, 2.0)", "25.9463", "'RA---TAN'", "'GLON-CAR'",
    "'RA---TAN-SIP'", "'RA---XYZ'", "'ELECTRONS'", "'MJy/sr'", "'mag'", "\xe9\xff", "/", "1D400", "0x10",
)  # fmt: skip
MORE = (
    "PC1_1", "PC2_2", "PC1_2", "CD1_1", "CD2_2", "A_ORDER", "B_ORDER", "A_2_0", "B_0_2", "A_0_9", "PV1_1",
    "PV2_3", "CROTA2", "BSCALE", "BZERO", "BLANK", "NAXIS3", "WCSAXES", "CUNIT1", "LONPOLE", "EQUINOX", "RADESYS",
    "SATURATE", "GAIN", "BUNIT", "EXPTIME", "PHOTFLAM", "PHOTPLAM", "PIXAR_SR", "CPDIS1", "DP1", "D2IMARR",
    "EXTNAME", "EXTEND", "GROUPS", "PCOUNT", "GCOUNT", "HIERARCH x", "CONTINUE", "END", "FILTER", "IMAGETYP",
    "INHERIT", "ZIMAGE", "TFIELDS", "DATE-OBS", "MJD-OBS",
)  # fmt: skip


def base(rng, kind):
    """A small image with a galaxy in it, as bytes: plain, in an extension, tile-compressed, or of integers."""
    y, x = np.indices((SIDE, SIDE))
    data = rng.normal(0, 0.004, (SIDE, SIDE)) + np.exp(-np.hypot(x - 19, 1.3 * (y - 21)) / 3)
    cards = {
        "CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CRVAL1": 150.1, "CRVAL2": 2.2, "CRPIX1": 20.0, "CRPIX2": 20.0,
        "CDELT1": -0.06 / 3600, "CDELT2": 0.06 / 3600, "MAGZERO": 25.9463, "SATURATE": 1e5, "OBSERVER": "me",
    }  # fmt: skip
    header = fits.Header(cards)
    if kind == 0:
        hdus = [fits.PrimaryHDU(data.astype("f4"), header)]
    elif kind == 1:
        error = fits.ImageHDU(np.full(data.shape, 0.004, "f4"), name="ERR")
        hdus = [fits.PrimaryHDU(), fits.ImageHDU(data.astype("f4"), header, name="SCI"), error]
    elif kind == 2:
        hdus = [fits.PrimaryHDU(), fits.CompImageHDU(data.astype("f4"), header)]
    else:
        hdus = [fits.PrimaryHDU((1000 * data).astype("i2"), header)]
        hdus[0].header.update({"BSCALE": 1e-3, "BLANK": -32768})
    buffer = io.BytesIO()
    fits.HDUList(hdus).writeto(buffer)
    return bytearray(buffer.getvalue())


def cards_of(content):
    """Offsets of the cards of all headers."""
    out, start = [], 0
    while (end := content.find(b"END" + b" " * 77, start)) >= 0:
        first = content.rfind(b"SIMPLE  =", 0, end)
        first = max(first, content.rfind(b"XTENSION=", 0, end))
        out += range(first, end + 80, 80)
        start = end + 80
    return out


def mutated(rng, content):
    """One to three changes of cards or bytes."""
    for _ in range(rng.integers(1, 4)):
        offsets = cards_of(content)
        if not offsets:
            break
        at = int(rng.choice(offsets))
        keyword = bytes(content[at : at + 8])
        what = int(rng.integers(9))
        value = str(rng.choice(VALUES)).encode("latin1")
        if what <= 2:
            content[at : at + 80] = (keyword + b"= " + value.rjust(20)).ljust(80)[:80]
        elif what == 3:
            content[at : at + 80] = b"COMMENT removed".ljust(80)
        elif what == 4:
            content[at : at + 80] = content[int(rng.choice(offsets)) :][:80]
        elif what == 5:
            content[at : at + 80] = (str(rng.choice(MORE)).encode().ljust(8) + b"= " + value.rjust(20)).ljust(80)[:80]
        elif what == 6:
            place = at + int(rng.integers(80))
            content[place : place + 5] = rng.bytes(5)
        elif what == 7:
            place = int(rng.integers(len(content)))
            content[place : place + 40] = rng.bytes(40)
        else:
            del content[int(rng.integers(len(content))) :]
    return bytes(content)


def outcome(path, catalogue, options):
    """Measure in this process: what is wrong, or an empty text."""
    from sersicnet import cli

    out, err = io.StringIO(), io.StringIO()
    sys.stdout, sys.stderr = out, err
    cli.shared.stderr.file = err
    try:
        cli.main(["measure", str(path), "-o", str(catalogue), "-q", "--json", "--workers", "1", *options])
    except SystemExit as done:
        code = done.code or 0
    except BaseException:
        return traceback.format_exc()
    finally:
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    said = err.getvalue().splitlines()
    if code == 0:
        from astropy.table import QTable

        json.loads(out.getvalue())
        QTable.read(catalogue)
        catalogue.unlink()
        return "" if all(line.startswith("Warning: ") for line in said) else f"said {said}"
    errors = [line for line in said if not line.startswith("Warning: ")]
    if code != 1 or len(errors) != 1 or not errors[0].startswith("Error: ") or out.getvalue():
        return f"exit code {code}, said {said}, {out.getvalue()[:200]!r}"
    if catalogue.exists():
        return "an error, and a catalogue"
    return ""


def measure_all(folder, first, last):
    """What the subprocess does: measure the mutations of these seeds, and print what is wrong as JSON."""
    import sersicnet.measuring.preload  # noqa: F401 -- the limit is that of an image, not of imports

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))

    def too_slow(number, frame):
        raise TimeoutError(f"more than {SECONDS} s")

    signal.signal(signal.SIGALRM, too_slow)
    wrong, good, longest = {}, 0, 0.0
    for seed in range(first, last):
        rng = np.random.default_rng(seed)
        path = Path(folder) / f"{seed}.fits"
        path.write_bytes(mutated(rng, base(rng, seed % 4)))
        options = ["--rms", f"{path}[ERR]"] if seed % 8 == 1 else []
        started = time.monotonic()
        signal.alarm(SECONDS)
        with warnings.catch_warnings():
            warnings.simplefilter("default")  # a warning of another package is a line on stderr
            problem = outcome(path, Path(folder) / "cat.ecsv", options)
        signal.alarm(0)
        longest = max(longest, time.monotonic() - started)
        good += not problem
        if problem:
            wrong[seed] = problem
        else:
            path.unlink()
    # Not `ru_maxrss`, which begins with that of the process that started this one.
    status = Path("/proc/self/status").read_text("ascii")
    peak = int(status.split("VmHWM:")[1].split()[0]) / 1024
    sys.stdout.write(json.dumps({"wrong": wrong, "good": good, "longest": longest, "peak [MB]": peak}) + "\n")


def test_mutated_images_give_a_catalogue_or_one_line(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_fuzz; test_fuzz.measure_all"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}({str(tmp_path)!r}, 0, {MUTATIONS})"],
        capture_output=True, text=True, timeout=SECONDS * MUTATIONS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert not found["wrong"], "\n".join(f"{seed}: {text}" for seed, text in found["wrong"].items())
    assert found["good"] == MUTATIONS
    assert found["peak [MB]"] < 2000
