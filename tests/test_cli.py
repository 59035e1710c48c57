import errno
import gc
import io
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import typer
from astropy.io import fits
from astropy.table import QTable, Table

import sersicnet
from sersicnet import cli, weights
from sersicnet.cli import shared
from sersicnet.dataset import Dataset
from sersicnet.errors import InputError, SersicnetWarning
from sersicnet.image import mosaic
from sersicnet.measuring import measure as measuring
from sersicnet.simulating.telescopes import F160W, effective_psf
from sersicnet.training.labels import real_galaxies

COMMANDS = ["measure", "fit", "validate", "simulate", "train", "finetune", "export", "adapt", "evaluate", "info"]
COMMAND = typer.main.get_command(cli.app).commands
OPTIONS = [(name, parameter) for name, command in COMMAND.items() for parameter in command.params]
HEAVY = {
    "tensorflow", "keras", "galsim", "photutils", "astropy", "h5py", "onnxruntime", "scipy", "matplotlib", "numpy",
}  # fmt: skip


@pytest.fixture
def run(capsys):
    """Run the command line in this process; returns exit code, stdout and stderr."""

    def call(*arguments):
        with pytest.raises(SystemExit) as done:
            cli.main([str(a) for a in arguments])
        out = capsys.readouterr()
        return done.value.code or 0, out.out, out.err

    return call


def imported_by(code):
    """Top-level modules that a fresh interpreter holds after some code."""
    script = (
        f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\nprint('|'.join(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stderr.splitlines()[-1].split("|")}


def test_a_summary_of_bands_with_values_from_different_sources(capsys):
    from astropy.table import QTable

    from sersicnet.cli.shared import say_catalogues

    table = QTable({"flags": [0]}, meta={"ZEROPT": 25.0, "PIXSCALE": 0.06, "PSFFWHM": 2.5, "PIXSRC": "WCS"})
    say_catalogues(False, False, [(table, "bands.fits")], 1.0)
    summary = capsys.readouterr().err
    assert "25.0000 AB" in summary
    assert "0.0600 arcsec, from WCS" in summary
    assert "FWHM 2.50 pixels" in summary


@pytest.mark.parametrize(
    ("rows", "told"),
    [([1], "1 source in 1.0 s"), ([1200], "1,200 sources in 1.0 s"), ([7, 7], "14 rows of 2 catalogues in 1.0 s")],
)
def test_a_summary_counts_sources_or_the_rows_of_several_catalogues(capsys, rows, told):
    """Catalogues of several bands list the same sources."""
    from astropy.table import QTable

    from sersicnet.cli.shared import say_catalogues

    say_catalogues(False, False, [(QTable({"flags": np.zeros(n, int)}), "cat.fits") for n in rows], 1.0)
    assert capsys.readouterr().err.splitlines()[-1].startswith(told)


def test_the_version_is_printed(run):
    assert run("--version") == (0, f"sersicnet {sersicnet.__version__}\n", "")


def test_what_a_noise_map_includes_is_an_option_of_measure_and_fit(run, field, tmp_path):
    for command in ("measure", "fit"):
        psf = () if command == "measure" else ("--psf", field[0])
        code, _, err = run(command, field[0], *psf, "--noise", "total")
        assert (code, err.count("\n")) == (1, 1)
        assert "--noise describes a noise map: give --rms or --wht or --var with it." in err
    noise = tmp_path / "noise.fits"
    fits.writeto(noise, np.ones((512, 512), np.float32))
    options = ("--rms", noise, "--noise", "total", "--noise-as-given")
    assert run("measure", field[0], *options, "-o", tmp_path / "cat.fits", "--dry-run")[0] == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert f"Example: sersicnet {command}" in out


def test_help_lists_every_command(run):
    _, out, _ = run("--help")
    assert all(command in out for command in COMMANDS)


@pytest.mark.parametrize("arguments", ["", *COMMANDS])
def test_help_imports_nothing_heavy(arguments):
    call = f"import sersicnet.cli; sersicnet.cli.main({[*arguments.split(), '--help']})"
    assert not imported_by(call) & HEAVY


def test_measuring_does_not_import_tensorflow(field, tmp_path):
    call = (
        f"import sersicnet.cli; sersicnet.cli.main(['measure', {str(field[0])!r}, '-o', {str(tmp_path / 'c.fits')!r}])"
    )
    assert not imported_by(call) & {"tensorflow", "keras", "galsim", "h5py"}


def test_measure_writes_a_catalogue_and_says_so(run, field, tmp_path):
    code, out, err = run("measure", field[0], "-o", tmp_path / "cat.fits")
    assert code == 0
    assert gc.isenabled()
    assert out == ""
    assert "25.9463 AB, from MAGZERO" in err
    table = QTable.read(tmp_path / "cat.fits")
    assert f"{len(table)} sources in" in err
    assert any("-o" in line for line in fits.getheader(tmp_path / "cat.fits", 1)["HISTORY"])


def test_fit_writes_labels_that_finetune_reads(run, field, tmp_path):
    fits.PrimaryHDU(effective_psf(F160W)).writeto(tmp_path / "psf.fits")
    bright = Table.read(str(field[0]).replace(".fits", "_truth.ecsv"))
    targets = bright["x", "y"][np.argsort(bright["mag"])[:2]]
    targets.add_row((-500.0, 3.0))
    targets.write(tmp_path / "targets.csv")
    code, _, err = run(
        "fit", field[0], "--psf", tmp_path / "psf.fits", "--gain", "3200", "--positions", tmp_path / "targets.csv",
        "-o", tmp_path / "labels.csv",
    )  # fmt: skip
    assert code == 0, err
    assert len(real_galaxies(tmp_path / "labels.csv").mag) == 2


def test_scripts_get_json(run, field, tmp_path):
    code, out, err = run("measure", field[0], "-o", tmp_path / "cat.fits", "--json", "--quiet")
    assert (code, err) == (0, "")
    [fact] = json.loads(out)["catalogues"]
    assert fact["sources"] == len(QTable.read(tmp_path / "cat.fits"))
    assert fact["header"]["ZPSOURCE"] == "MAGZERO"
    assert fact["flags"]["EDGE"] > 0
    wanted = "id,mag,flux_ujy,r_eff_p16"
    code, out, err = run("measure", field[0], "-o", tmp_path / "few.csv", "--columns", wanted, "--json")
    assert code == 0
    assert "flags" not in json.loads(out)["catalogues"][0]  # nothing is known of them
    assert "without flags" not in err
    assert QTable.read(tmp_path / "few.csv").colnames == wanted.split(",")


def test_what_goes_with_a_catalogue(run, field, tmp_path):
    field[1].write(tmp_path / "truth.ecsv")
    code, out, err = run(
        "measure", field[0], "-o", tmp_path / "cat.fits", "--regions", tmp_path / "cat.reg",
        "--report", tmp_path / "page.html", "--match", tmp_path / "truth.ecsv",
    )  # fmt: skip
    assert code == 0, err
    assert "have a partner" in out
    names = ["cat.fits", "cat.reg", "cat_match.md", "cat_match.png", "page.html", "truth.ecsv"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert "have a partner" in (tmp_path / "page.html").read_text()
    code, _, err = run("measure", field[0], "-o", tmp_path / "b.fits", "--report", tmp_path / "page.pdf")
    assert (code, "A report ends in .html" in err) == (1, True)


def test_a_dry_run_tells_what_would_be_done_and_does_nothing(run, field, tmp_path):
    code, out, _ = run("measure", field[0], "-o", tmp_path / "cat.fits", "--dry-run")
    assert code == 0
    assert "zero point   25.9463 AB, from MAGZERO" in out
    assert "512 x 512 pixels" in out
    assert "weights      fovea, on the CPU" in out
    code, _, err = run("measure", field[0], "--dry-run", "--device", "gpu")
    assert (code, err.count("\n")) == (1, 1)
    assert "--device gpu needs an ONNX Runtime" in err
    code, out, _ = run("measure", field[0], "--dry-run", "--json")
    assert json.loads(out)[0]["tiles"] == 1
    assert not list(tmp_path.iterdir())


def test_verbose_tells_what_is_done(run, field, tmp_path):
    _, _, err = run("measure", field[0], "-o", tmp_path / "cat.fits", "-v")
    assert "tile-0-0" in err
    assert "without flags" in err


def test_patterns_name_images(run, field, tmp_path):
    for name in ("one.fits", "two.fits"):
        shutil.copy(field[0], tmp_path / name)
    code, _, err = run("measure", tmp_path / "*.fits", "-o", tmp_path / "all.ecsv")
    assert code == 0, err
    assert len(set(QTable.read(tmp_path / "all.ecsv")["image"])) == 2
    for arguments, message in (
        ((tmp_path / "none-*.fits",), "No file matches"),
        ((tmp_path / "*.fits",), "give --output"),
        ((tmp_path / "*.fits", "--rms", field[0], "-o", tmp_path), "belongs to one"),
    ):
        code, _, err = run("measure", *arguments)
        assert code == 1
        assert message in err


def test_the_default_output_is_named_after_the_image(run, field, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f160w_v1.0_drz.fits").symlink_to(field[0])
    assert run("measure", "f160w_v1.0_drz.fits")[0] == 0
    assert (tmp_path / "f160w_v1.0_drz_cat.fits").exists()


def test_quiet_is_quiet(run, field, tmp_path):
    assert run("measure", field[0], "-o", tmp_path / "cat.fits", "--quiet") == (0, "", "")


def test_wrong_usage_exits_with_2(run):
    assert run("measure")[0] == 2
    assert run("measure", "a.fits", "--no-such-option")[0] == 2
    assert run("simulate", "--n", "many")[0] == 2


def test_bad_input_is_one_line_and_leaves_nothing(run, field, blank, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = field[0].read_bytes()
    (tmp_path / "text.fits").write_text("no FITS")
    (tmp_path / "cut.fits").write_bytes(good[: len(good) // 2])
    Table({"a": [1.0]}).write(tmp_path / "table.fits")
    blank("cube.fits", data=np.zeros((3, 40, 40)))
    blank("nan.fits", data=np.full((200, 200), np.nan))
    blank("nozp.fits", cards={})
    blank("plain.fits")
    (tmp_path / "old.fits").write_text("mine")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in weights.load(weights.DEFAULT).path.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    content = bytearray((damaged / "network.onnx").read_bytes())
    content[1000] ^= 1
    (damaged / "network.onnx").write_bytes(content)
    labels = tmp_path / "labels.csv"
    labels.write_text("image,x,y,mag,r_eff_pix,sersic_n\nplain.fits,1,1,20,5,1\n")
    outside = tmp_path / "outside.csv"
    outside.write_text("image,x,y,mag,r_eff_pix,sersic_n,q\nplain.fits,1,1,20,5,1,1\nplain.fits,999,1,20,5,1,1\n")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    measure = ("measure", "-o", "cat.fits")
    for arguments, message in (
        ((*measure, "none.fits"), "no such file"),
        ((*measure, "text.fits"), "not a readable FITS file"),
        ((*measure, "cut.fits"), "cut short"),
        ((*measure, "table.fits"), "holds no image"),
        ((*measure, "table.fits", "--hdu", "1"), "is a table, not an image"),
        ((*measure, "cube.fits"), "has 3 axes"),
        ((*measure, "nan.fits"), "no pixel left that is finite"),
        ((*measure, "nozp.fits"), "gives no zero point"),
        (("measure", field[0], "-o", "old.fits"), "exists already"),
        (("measure", field[0], "-o", "."), "is a directory"),
        ((*measure, field[0], "-w", "damaged"), "does not have the SHA-256"),
        ((*measure, field[0], "-w", "nothing"), "a shipped name"),
        ((*measure, field[0], "--positions", "none.csv"), "there is none"),
        ((*measure, field[0], "--columns", "id,magg"), "received 'magg'. Is it mag"),
        ((*measure, field[0], "--columns", "id,+mag"), "--columns adds to the columns by default"),
        ((*measure, field[0], "--columns", "+chi2"), "--columns lists chi2, which needs fits. Leave it out."),
        (("finetune", "--real", "labels.csv"), "needs a column ellipticity or q"),
        (("finetune", "--real", "outside.csv"), "line 3"),
        (("finetune", "--real", field[0]), "is an image. `sersicnet adapt` takes an image without labels"),
        (("finetune", "--real", "outside.csv", "-o", "old.fits"), "exists already"),
        (("train", "none.h5", "--adapt", "dann", "--real", "outside.csv", "-o", "old.fits"), "exists already"),
        (("train", "none.h5", "--alpha", "0.5"), "are for --adapt; received --alpha without it"),
        (("train", "none.h5", "--epochs", "0", "--batch", "8"), "nothing is trained: leave out --batch."),
        (("train", "none.h5", "--epochs", "0", "--no-anneal"), "nothing is trained: leave out --no-anneal."),
        (("train", "none.h5", "--on-the-fly", "--symmetries"), "drawn --on-the-fly have random directions"),
        (("train", "none.h5", "--no-real-labels"), "are for --adapt; received --no-real-labels without it"),
        (("train", "none.h5"), "there is none"),
        (("evaluate", "none.h5"), "there is none"),
        (("evaluate", "table.fits"), "give --truth for table.fits"),
        (("evaluate", "none.h5", "--tolerance", "1"), "received --tolerance without it"),
        (("evaluate", "table.fits", "--truth", "none.ecsv"), "there is none"),
        (("evaluate", "table.fits", "--truth", "table.fits"), "needs columns mag, r_eff_pix"),
        (("evaluate", "table.fits", "--truth", "table.fits", "--tolerance", "-1"), "A tolerance is positive"),
        (("evaluate", "table.fits", "--truth", "table.fits", "-w", "a", "--limits"), "received --weights, --limits"),
        (("simulate", "-o", "old.fits", "--n", "4"), "exists already"),
        (("simulate", "--psf", "plain.fits"), "Give a larger image of a whole star"),
        (("simulate", "--psf", "text.fits"), "not a readable FITS file"),
        (("simulate", "--noise-from", "nozp.fits"), "gives no zero point"),
        (("simulate", "--prior", "labels.csv"), "needs a column ellipticity or q"),
        (("simulate", "--prior", "candels", "--log-radii", "0.5"), "leave out either"),
        (("simulate", "--preview", "sheet.gif"), "ends in .png or .pdf"),
        (("simulate", "--galaxies", "spiral"), "sersic or real-like"),
        (("simulate", "--mosaic", "300", "--neighbours"), "--mosaic takes --n or --telescopes, --seed and --output"),
        (("simulate", "--mosaic", "300", "--telescopes", "hsc", "--n", "5"), "received --n with it"),
        (("simulate", "--mosaic", "300", "--zero-point", "25"), "received --zero-point with it"),
        (("simulate", "--telescopes", "any", "--zero-point", "25"), "received --zero-point with it"),
    ):
        code, out, err = run(*arguments)
        assert code == 1, arguments
        assert out == ""
        lines = [line for line in err.splitlines() if not line.startswith(("Warning", "training on"))]
        assert len(lines) == 1, err
        assert lines[0].startswith("Error: ")
        assert message in lines[0]
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before, arguments


def test_the_commands_are_these_in_this_order():
    assert list(COMMAND) == COMMANDS


@pytest.mark.parametrize(("name", "parameter"), OPTIONS, ids=[f"{name}-{p.name}" for name, p in OPTIONS])
def test_messages_name_an_option_by_its_parameter(name, parameter):
    told = COMMAND[name].with_options(f"Give `{parameter.name}`.")
    if parameter.param_type_name == "argument":
        assert told == f"Give {parameter.metavar or parameter.name.upper()}."
    else:
        assert re.fullmatch("Give --[a-z0-9-]+[.]", told)
        assert told[5:-1] in parameter.opts


@pytest.mark.parametrize(
    ("name", "message", "told"),
    [
        ("measure", "give `noise` or `weights`", "give --rms or --wht or --var or --weights"),
        ("measure", "`workers=1` needs least memory", "--workers 1 needs least memory"),
        ("measure", "give `prior='none'` or `refine=True`", "give --prior none or --refine"),
        ("train", "give `real_labels=False`", "give --no-real-labels"),
        ("adapt", "`how` is none or dann, `base` a name", "--adapt is none or dann, --weights a name"),
        ("export", "run `sersicnet adapt` or `pip install galsim`", "run `sersicnet adapt` or `pip install galsim`"),
        ("export", "`zero_point` is for others", "`zero_point` is for others"),
    ],
)
def test_messages_name_options(name, message, told):
    assert COMMAND[name].with_options(message) == told


def test_other_names_are_needed_and_lead_to_options():
    for name, others in shared.OTHER_NAMES.items():
        assert any(other in {p.name for p in command.params} for command in COMMAND.values() for other in others), name


def test_errors_and_warnings_name_options(run, field, monkeypatch, tmp_path):
    def fail(*arguments, **options):
        warnings.warn("Without `pixel_scale` there is no `sersicnet adapt`.", SersicnetWarning, stacklevel=2)
        raise InputError("Give `zero_point` or `overwrite`.")

    monkeypatch.setattr(measuring, "measure", fail)
    code, out, err = run("measure", field[0], "-o", tmp_path / "cat.fits")
    assert (code, out) == (1, "")
    assert err.splitlines() == [
        "Warning: Without --pixel-scale there is no `sersicnet adapt`.",
        "Error: Give --zero-point or --overwrite.",
    ]


@pytest.mark.parametrize(
    ("raised", "code", "told"),
    [
        (KeyboardInterrupt(), 130, ""),
        (SystemExit(3), 3, ""),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, ""),
        (PermissionError(errno.EACCES, "denied", "cat.fits"), 1, "Error: [Errno 13] denied: 'cat.fits'\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "Error: [Errno 28] No space left on device\n"),
    ],
)
def test_interruptions_and_the_system_s_errors_are_no_tracebacks(run, field, monkeypatch, tmp_path, raised, code, told):
    def fail(*arguments, **options):
        raise raised

    monkeypatch.setattr(measuring, "measure", fail)
    assert run("measure", field[0], "-o", tmp_path / "cat.fits") == (code, "", told)
    assert not list(tmp_path.iterdir())


def test_an_interruption_before_the_command_begins_is_no_traceback(monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_built", lambda: interrupted)
    with pytest.raises(SystemExit) as done:
        cli.main(["info"])
    assert done.value.code == 130


def test_an_error_of_the_system_that_names_no_file_is_a_bug(field, monkeypatch, tmp_path):
    def fail(*arguments, **options):
        raise OSError("a mistake of ours")

    monkeypatch.setattr(measuring, "measure", fail)
    with pytest.raises(OSError, match="a mistake of ours"):
        cli.main(["measure", str(field[0]), "-o", str(tmp_path / "cat.fits")])


def test_an_empty_sky_is_a_warning(run, blank, tmp_path):
    code, _, err = run("measure", blank(), "-o", tmp_path / "cat.fits")
    assert code == 0
    assert "Warning: No source was detected" in err
    assert "Warning: " in err
    assert "no celestial WCS" in err
    assert len(QTable.read(tmp_path / "cat.fits")) == 0


def test_simulate_and_evaluate(run, tmp_path):
    code, _, err = run("simulate", "--n", "40", "-o", tmp_path / "t.h5", "--seed", "9")
    assert code == 0
    assert "40 stamps" in err
    code, out, _ = run("evaluate", tmp_path / "t.h5", "-o", tmp_path / "scores")
    assert code == 0
    assert "| all | 40 | R² |" in out


def test_a_catalogue_is_scored_with_its_truth(run, field, tmp_path):
    assert run("measure", field[0], "-o", tmp_path / "cat.ecsv", "--quiet")[0] == 0
    truth = str(field[0]).replace(".fits", "_truth.ecsv")
    code, out, err = run("evaluate", tmp_path / "cat.ecsv", "--truth", truth, "--tolerance", "0.5")
    assert code == 0, err
    assert "0.5 arcsec" in out
    assert "flags == 0" in out
    few = QTable.read(tmp_path / "cat.ecsv")["ra", "dec", "mag", "r_eff_pix", "sersic_n", "ellipticity"]
    few.write(tmp_path / "few.ecsv")
    code, out, err = run("evaluate", tmp_path / "few.ecsv", "--truth", truth, "-o", tmp_path / "few.json")
    assert code == 0, err
    assert "flags == 0" not in out
    few.remove_column("sersic_n")
    few.write(tmp_path / "less.ecsv")
    code, _, err = run("evaluate", tmp_path / "less.ecsv", "--truth", truth, "-o", tmp_path / "less.json")
    assert code == 1
    assert "needs a column sersic_n or n; it has ra, dec, mag" in err


def test_simulate_a_mosaic(run, tmp_path):
    code, _, err = run("simulate", "--mosaic", "256", "--n", "5", "-o", tmp_path / "m.fits")
    assert code == 0
    assert "5 galaxies" in err
    assert mosaic.read_image(tmp_path / "m.fits").data.shape == (256, 256)
    assert len(Table.read(tmp_path / "m_truth.ecsv")) == 5


def test_simulate_from_one_s_own_data(run, tmp_path, field):
    table = tmp_path / "galaxies.csv"
    rng = np.random.default_rng(0)
    columns = {"mag": rng.uniform(20, 23, 200), "r_eff": rng.uniform(0.2, 0.6, 200), "q": rng.uniform(0.2, 0.9, 200)}
    Table({**columns, "sersic_n": rng.uniform(1, 4, 200)}).write(table)
    psf = tmp_path / "psf.fits"
    fits.PrimaryHDU(effective_psf(F160W, 61)).writeto(psf)
    code, _, err = run(
        "simulate", "--n", "8", "--prior", table, "--psf", psf, "--psf", psf, "--noise-from", field[0],
        "--neighbours", "--preview", tmp_path / "sheet.png", "-o", tmp_path / "t.h5",
    )  # fmt: skip
    assert code == 0, err
    assert (tmp_path / "sheet.png").stat().st_size > 10_000
    with Dataset(tmp_path / "t.h5") as data:
        assert len(data) == 8
        assert 20 <= data.mag.min() < data.mag.max() <= 23
        assert [p["name"] for p in data.config["psfs"]] == ["psf.fits", "psf.fits"]


def test_a_preview_alone_writes_no_set(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("simulate", "--n", "4", "--preview", "sheet.pdf", "--quiet") == (0, "", "")
    assert [p.name for p in tmp_path.iterdir()] == ["sheet.pdf"]


def test_train_and_fine_tune(run, small_dataset, field, tmp_path, tiny_network):
    code, _, err = run(
        "train", small_dataset, "-o", tmp_path / "w", "--epochs", "1", "--batch", "32", "--network", tiny_network
    )
    assert code == 0
    assert weights.load(tmp_path / "w").card["recipe"]["batch"] == 32
    assert "R_e [px]" in err
    assert "training on" in err
    rows = ["x,y,mag,r_eff_pix,sersic_n,ellipticity"]
    rows += [f"{r['x']},{r['y']},{r['mag']},{r['r_eff_pix']},{r['sersic_n']},{r['ellipticity']}" for r in field[1]]
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    code, _, err = run(
        "finetune", "--real", tmp_path / "labels.csv", "--image", field[0], "-w", tmp_path / "w", "-o", tmp_path / "f",
        "--epochs", "1", "--layers", "all",
    )  # fmt: skip
    assert code == 0, err
    assert weights.load(tmp_path / "f").card["network"] == tiny_network


def test_info_is_markdown_for_a_bug_report(run):
    code, out, _ = run("info")
    assert code == 0
    assert out.startswith(f"## sersicnet {sersicnet.__version__}")
    for word in ("numpy", "onnxruntime", "training runs on", weights.DEFAULT, "R²"):
        assert word in out


def test_training_uses_the_fast_kernels_and_starts_in_silence():
    code = (
        "import os; from sersicnet.training import device; device.device(); print(os.environ['TF_ENABLE_ONEDNN_OPTS'])"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TF_")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert (done.stdout, done.stderr) == ("1\n", "")


def test_keras_is_imported_by_its_home_alone():
    """`sersicnet.networks` sets TensorFlow's switches before the import; a second home would forget them."""
    sources = Path(sersicnet.__file__).parent.glob("*.py")
    importing = [
        p.name for p in sources if re.search(r"^(import|from) (keras|tensorflow)", p.read_text(), re.MULTILINE)
    ]
    assert importing == ["networks.py"]


def test_the_installed_command_starts_without_the_test_tools(tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    done = subprocess.run(
        [sys.executable, "-m", "sersicnet", "--help"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=False,
    )
    assert done.returncode == 0


def valid(text):
    """JSON as the standard has it, without NaN."""
    return json.loads(text, parse_constant=pytest.fail)


def test_messages_that_cannot_be_written_end_nothing(monkeypatch):
    class Broken(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    for broken in (Broken(), None):
        with monkeypatch.context() as without:
            without.setattr(sys, "stderr", broken)
            for _ in range(2):
                shared.say(False, "done")
            if sys.stderr is not None:
                sys.stderr.close()


def test_json_is_valid_without_a_pixel_scale(run, blank, tmp_path):
    image = blank()
    code, out, err = run("measure", image, "--dry-run", "--json")
    assert code == 0
    assert valid(out)[0]["pixel_scale"] == [None, "none"]
    assert "pixel scale  not known, so sizes will be in pixels alone" in run("measure", image, "--dry-run")[1]
    code, out, err = run("measure", image, "--json", "-q", "--workers", 1, "-o", tmp_path / "cat.fits")
    assert code == 0
    assert valid(out)["catalogues"][0]["sources"] == 0
    assert all(line.startswith("Warning: ") for line in err.splitlines())


def test_names_that_are_no_text_are_one_line_each(run, field, tmp_path):
    strange = tmp_path / "a\tb\x1b[31m\udcff\nc"
    strange.mkdir()
    shutil.copy(field[0], strange / "m\x07\udcff.fits")
    (strange / "p\udcff.csv").write_text("x,y\n100,100\n")
    products = (
        "--report",
        strange / "r\udcff.html",
        "--regions",
        strange / "r\udcff.reg",
        "--match",
        strange / "p\udcff.csv",
    )
    for ending in ("fits", "vot"):
        output = strange / f"c\x01\udcff.{ending}"
        code, _, err = run(
            "measure", strange / "m\x07\udcff.fits", "--workers", 1, "-o", output, "--overwrite", *products
        )
        assert code == 0, err
        assert len(err.split("wrote ")[1].splitlines()) == 2
        assert output.exists()
    code, _, err = run("measure", strange / "m\x07\udcff.fits", "--workers", 1, "-o", output)
    assert (code, len(err.splitlines())) == (1, 1)
    assert r"a\tb\x1b[31m\udcff\nc/c\x01\udcff.vot exists already" in err


def test_an_image_is_not_replaced_through_a_link(run, field, tmp_path):
    shutil.copy(field[0], tmp_path / "m.fits")
    (tmp_path / "cat.fits").symlink_to("m.fits")
    before = (tmp_path / "m.fits").read_bytes()
    code, _, err = run("measure", tmp_path / "m.fits", "-o", tmp_path / "cat.fits", "--workers", 1, "--overwrite")
    assert (code, len(err.splitlines())) == (1, 1)
    assert "No output replaces a file that is read; received m.fits for both" in err
    assert (tmp_path / "m.fits").read_bytes() == before


@pytest.mark.parametrize("verb", ["measure", "fit", "validate"])
def test_no_input_is_replaced(run, field, tmp_path, verb):
    psf, table = tmp_path / "psf.fits", tmp_path / "places.fits"
    fits.writeto(psf, effective_psf(F160W, 61))
    Table({"x": [100.0], "y": [100.0]}).write(table)
    before = psf.read_bytes(), table.read_bytes()
    options = ("--galaxies" if verb == "validate" else "--positions", f"{table}[1]", "--psf", psf, "--overwrite")
    for output in (psf, table):
        code, _, err = run(verb, field[0], *options, "-o", output, "--gain", 3000)
        assert (code, len(err.splitlines())) == (1, 1), err
        assert f"No output replaces a file that is read; received {output.name} for both" in err
    assert (psf.read_bytes(), table.read_bytes()) == before


def test_no_input_of_several_images_is_replaced(run, field, tmp_path):
    first, second, psf = tmp_path / "a.fits", tmp_path / "b.fits", tmp_path / "inj-2.fits"
    for path in (first, second):
        shutil.copy(field[0], path)
    fits.writeto(psf, effective_psf(F160W, 61))
    before = first.read_bytes(), psf.read_bytes()
    for output in (first, psf):
        code, _, err = run("measure", first, second, "--psf", psf, "-o", output, "--gain", 3000, "--overwrite")
        assert (code, len(err.splitlines())) == (1, 1), err
        assert f"No output replaces a file that is read; received {output.name} for both" in err
    options = ("--psf", psf, "--injected", tmp_path / "inj.fits", "-o", tmp_path / "v.fits", "--overwrite")
    code, _, err = run("validate", first, *options, "--gain", 3000)
    assert "received inj-2.fits for both" in err
    assert (first.read_bytes(), psf.read_bytes()) == before


def test_places_of_another_field_are_a_warning(run, field, tmp_path):
    (tmp_path / "far.csv").write_text("x,y\n9000,9000\n-700,3\n")
    (tmp_path / "none.csv").write_text("x,y\n")
    for name, words in (("far.csv", "far.csv is inside"), ("none.csv", "none.csv has no rows")):
        code, _, err = run(
            "measure", field[0], "--positions", tmp_path / name, "-o", tmp_path / "c.fits", "--overwrite"
        )
        assert code == 0, err
        assert words in " ".join(err.split())


@pytest.mark.parametrize("options", [("-o", "a.h5"), ("-o", "a.fits", "--mosaic", 500)])
def test_a_set_larger_than_the_disk_is_one_line(run, tmp_path, options, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run("simulate", "--n", 10**12, *options)
    assert (code, len(err.splitlines())) == (1, 1)
    assert "Give a smaller --n, or a name on another disk." in err
    assert list(tmp_path.iterdir()) == []


def test_a_catalogue_is_scored_from_an_extension(run, field, tmp_path):
    run("measure", field[0], "-q", "--workers", 1, "-o", tmp_path / "cat.fits")
    truth = field[0].with_name("field_truth.ecsv")
    code, _, err = run("evaluate", f"{tmp_path / 'cat.fits'}[CATALOG]", "--truth", truth)
    assert code == 0, err


def test_the_psf_of_a_catalogue_is_stated_in_words():
    header = {"PSFSRC": "31 stars", "PSFFWHM": 3.15, "PSFERR": 0.006, "PSFLIGHT": 0.823, "PIXSCALE": 0.06}
    words = "FWHM 3.15 ± 0.02 pixels, 0.189 arcsec, 82% of the light within two FWHM; 31 stars"
    assert shared.psf_in_words({**header, "PSFMIN": 3.15, "PSFMAX": 3.15}) == words
    varies = shared.psf_in_words({**header, "PSFMIN": 3.05, "PSFMAX": 3.3})
    assert varies == words.replace("arcsec", "arcsec, 3.05 to 3.30 over the image")
    assert shared.psf_in_words({"PSFSRC": "psf.fits", "PSFFWHM": 3.0, "PIXSCALE": 0.06}) == "FWHM 3.00 pixels; psf.fits"
