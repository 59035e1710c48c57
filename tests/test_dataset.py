import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import h5py
import numpy as np
import pytest
from astropy.io import fits
from astropy.table import QTable

from sersicnet import dataset
from sersicnet.catalogue import table as tables
from sersicnet.dataset import BLOCK, Arrays, Dataset
from sersicnet.errors import DatasetError, InputError, OutputError
from sersicnet.image import mosaic
from sersicnet.journal import Journal, pack
from sersicnet.schema import Inputs, noise_numbers
from sersicnet.simulating.recipe import Simulation
from sersicnet.simulating.simulate import simulate
from sersicnet.simulating.stamps import draw_stamps
from sersicnet.simulating.telescopes import F160W
from sersicnet.training import labels


def test_stamps_come_back_within_half_a_quantum(small_dataset):
    original, truth = draw_stamps(Simulation(64, seed=5), np.arange(20, 30))
    with Dataset(small_dataset) as data:
        read = data.stamps(20, 30)
        np.testing.assert_allclose(data.truth["sersic_n"][20:30], truth["sersic_n"])
    assert read.dtype == np.float32
    difference = read - original / truth["rms"][:, None, None]
    assert np.abs(difference).max() < 0.51 / dataset.QUANTA_PER_RMS


def test_targets_hold_the_magnitude_relative_to_the_noise(small_dataset):
    with Dataset(small_dataset) as data:
        flux_over_rms = 10 ** (-0.4 * (data.mag - data.zero_point)) / data.truth["rms"]
        np.testing.assert_allclose(data.targets[:, 0], -2.5 * np.log10(flux_over_rms))


def test_a_dataset_may_be_smaller_than_a_block(tmp_path):
    original, truth = draw_stamps(Simulation(3, seed=5), np.arange(3))
    with Journal(tmp_path / "a", 3, ATTRIBUTES) as journal:
        journal.add(pack(0, original, truth))
        journal.finish()
    with Dataset(tmp_path / "a") as data:
        assert len(data) == 3
        np.testing.assert_allclose(data.stamps(0, 3), original / truth["rms"][:, None, None], atol=0.04)


@pytest.mark.parametrize("size", [7, 16, 64])
def test_batches_show_every_row_once(small_dataset, size):
    with Dataset(small_dataset) as data:
        batches = list(dataset.streamed(data, size, 16, 64, np.random.default_rng(0), pool_blocks=2))
        seen = np.concatenate([indices for _, indices in batches])
        assert sorted(seen) == list(range(16, 64))
        assert list(seen) != sorted(seen)
        assert all(i.n == size for i, _ in batches[:-1])
        for batch, indices in batches:
            np.testing.assert_array_equal(batch.stamps[0], data.stamps(indices[0], indices[0] + 1)[0])


def test_batches_without_a_generator_keep_the_order(small_dataset):
    with Dataset(small_dataset) as data:
        seen = np.concatenate([indices for _, indices in data.batches(10, 0, 64)])
    assert list(seen) == list(range(64))


def test_selection_by_magnitude(small_dataset):
    with Dataset(small_dataset) as data:
        bright = data.selected(20.0, 5)
        rows = np.flatnonzero(data.mag <= 20)[:5]
        np.testing.assert_array_equal(bright.mag, data.mag[rows])
        np.testing.assert_array_equal(bright.inputs(0, 5).stamps[3], data.stamps(rows[3], rows[3] + 1)[0])
        with pytest.raises(DatasetError, match="no galaxy brighter"):
            data.selected(3.0, None)


def test_hash_names_the_content(small_dataset, tmp_path):
    with Dataset(small_dataset) as data:
        assert data.sha256() == data.sha256()
        one = data.selected(99, 4)
    assert one.sha256() != one.taken(np.array([1, 0, 2, 3])).sha256()


def test_hash_depends_on_the_recipe_but_not_on_the_command(small_dataset, tmp_path):
    """Galaxies of one seed are the same through every PSF."""
    hashes = []
    for recipe in ({"psf_fwhm": 0.15}, {"psf_fwhm": 0.2}, {"psf_fwhm": 0.2, "command": "another"}):
        path = shutil.copy(small_dataset, tmp_path / f"{len(hashes)}.h5")
        with h5py.File(path, "a") as file:
            file.attrs["config"] = json.dumps({**json.loads(file.attrs["config"]), **recipe})
        with Dataset(path) as data:
            hashes.append(data.sha256())
    assert hashes[0] != hashes[1] == hashes[2]


ATTRIBUTES = {"config": {"seed": 5, "command": "one"}, "versions": {}, "zero_point": 25.0, "pixel_scale": 0.06}


def blocks():
    simulation = Simulation(40, seed=5)
    return [pack(f, *draw_stamps(simulation, np.arange(f, min(f + BLOCK, 40)))) for f in (0, 16, 32)]


def test_a_journal_in_any_order_makes_the_same_dataset(tmp_path):
    for name, order in (("a", (0, 1, 2)), ("b", (2, 0, 1))):
        with Journal(tmp_path / name, 40, ATTRIBUTES) as journal:
            for i in order:
                journal.add(blocks()[i])
            journal.finish()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
    with Dataset(tmp_path / "a") as a, Dataset(tmp_path / "b") as b:
        np.testing.assert_array_equal(a.stamps(0, 40), b.stamps(0, 40))
        np.testing.assert_array_equal(a.targets, b.targets)


@pytest.mark.parametrize("lost", [1, 1000, 200_000])
def test_a_journal_cut_anywhere_is_continued(tmp_path, lost):
    with Journal(tmp_path / "a", 40, ATTRIBUTES) as journal:
        for block in blocks()[:2]:
            journal.add(block)
        file = journal.file
    content = file.read_bytes()
    file.write_bytes(content[:-lost])
    other = {**ATTRIBUTES, "config": {"seed": 5, "command": "two"}}
    with Journal(tmp_path / "a", 40, other) as journal:
        assert journal.missing() == [16, 32]
        for block in blocks()[1:]:
            journal.add(block)
        journal.finish()
    with Dataset(tmp_path / "a") as a:
        original, truth = draw_stamps(Simulation(40, seed=5), np.arange(40))
        np.testing.assert_allclose(a.stamps(0, 40), original / truth["rms"][:, None, None], atol=0.04)


def test_a_damaged_record_is_drawn_again(tmp_path):
    with Journal(tmp_path / "a", 40, ATTRIBUTES) as journal:
        for block in blocks()[:2]:
            journal.add(block)
        file = journal.file
    content = bytearray(file.read_bytes())
    content[-5000] ^= 1
    file.write_bytes(content)
    with Journal(tmp_path / "a", 40, ATTRIBUTES) as journal:
        assert journal.missing() == [16, 32]


def test_a_journal_of_other_options_is_kept(tmp_path):
    with Journal(tmp_path / "a", 40, ATTRIBUTES) as journal:
        journal.add(blocks()[0])
    with pytest.raises(InputError, match=r"unfinished run with other options \(n: 40, now 41\)"):
        Journal(tmp_path / "a", 41, ATTRIBUTES)
    with Journal(tmp_path / "a", 40, ATTRIBUTES, overwrite=True) as journal:
        assert journal.missing() == [16, 32]
    with Journal(tmp_path / "a", 41, ATTRIBUTES, overwrite=True) as journal:
        assert journal.missing() == [0, 16, 32]


def test_a_journal_that_is_damaged_while_it_grows_makes_no_dataset(tmp_path):
    with Journal(tmp_path / "a", 40, ATTRIBUTES) as journal:
        for block in blocks():
            journal.add(block)
        content = bytearray(journal.file.read_bytes())
        content[-100_000] ^= 1
        journal.file.write_bytes(content)
        with pytest.raises(DatasetError, match=r"is damaged: the stamps from row 32 .* Repeat the command"):
            journal.finish()
    assert [p.name for p in tmp_path.iterdir()] == ["a.run"]
    with Journal(tmp_path / "a", 40, ATTRIBUTES) as journal:
        assert journal.missing() == [32]
        journal.add(blocks()[2])
        journal.finish()
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_journal_without_a_block_leaves_nothing(tmp_path):
    with Journal(tmp_path / "a", 40, ATTRIBUTES) as journal:
        assert journal.missing() == [0, 16, 32]
    assert not list(tmp_path.iterdir())


def test_two_journals_of_the_same_dataset_do_not_mix(tmp_path):
    with Journal(tmp_path / "a", 40, ATTRIBUTES), pytest.raises(InputError, match="is in use: process"):
        Journal(tmp_path / "a", 40, ATTRIBUTES)


@pytest.mark.parametrize("tail", [b"\0" * 4096, b"\xff" * 500])
def test_a_journal_with_a_garbled_tail_is_continued(tmp_path, tail):
    with Journal(tmp_path / "a", 40, ATTRIBUTES) as journal:
        journal.add(blocks()[0])
        file = journal.file
    size = file.stat().st_size
    with file.open("ab") as handle:
        handle.write(tail)
    with Journal(tmp_path / "a", 40, ATTRIBUTES) as journal:
        assert journal.missing() == [16, 32]
    assert file.stat().st_size == size


@pytest.fixture
def with_status(tmp_path):
    """A dataset of 40 stamps, every third of which has no good label; returns it and its statuses."""
    status = np.where(np.arange(40) % 3 == 1, 2.0, 0.0)
    columns = (*dataset.TRUTH_COLUMNS, "status")
    with Journal(tmp_path / "status.h5", 40, ATTRIBUTES, columns=columns) as journal:
        for block in blocks():
            rows = slice(block.first, block.first + len(block.quantum))
            block.truth["status"] = status[rows]
            block.truth["mag"] = np.where(status[rows] > 0, np.nan, block.truth["mag"])
            journal.add(block)
        return journal.finish(), status


def test_galaxies_without_a_good_label_are_left_out(with_status):
    path, status = with_status
    good = np.flatnonzero(status == 0)
    with Dataset(path) as data, Dataset(path, every=True) as whole:
        assert len(data) == len(good)
        assert len(whole) == 40
        np.testing.assert_array_equal(data.stamps(0, len(good)), whole.stamps(0, 40)[good])
        np.testing.assert_array_equal(data.stamps(5, 9), whole.stamps(0, 40)[good[5:9]])
        assert len(data.stamps(3, 3)) == 0
        np.testing.assert_array_equal(data.targets, whole.targets[good])
        assert np.isfinite(data.targets).all()
        assert data.sha256() != whole.sha256()
        seen = {}
        for batch, indices in dataset.streamed(data, 7, 0, len(data), np.random.default_rng(0), pool_blocks=1):
            seen.update(zip(indices.tolist(), batch.stamps, strict=True))
        assert sorted(seen) == list(range(len(good)))
        for index, stamp in seen.items():
            np.testing.assert_array_equal(stamp, data.stamps(index, index + 1)[0])
        np.testing.assert_array_equal(data.selected(np.inf, 4).inputs(0, 4).stamps, data.stamps(0, 4))


def test_a_dataset_without_any_good_label_is_refused(tmp_path):
    with Journal(tmp_path / "bad.h5", 40, ATTRIBUTES, columns=(*dataset.TRUTH_COLUMNS, "status")) as journal:
        for block in blocks():
            block.truth["status"] = np.ones(len(block.quantum))
            journal.add(block)
        journal.finish()
    with pytest.raises(DatasetError, match="no galaxy with status 0"):
        Dataset(tmp_path / "bad.h5")


def test_a_journal_with_further_columns_is_continued(tmp_path):
    columns = (*dataset.TRUTH_COLUMNS, "psf")
    for rows in ((0, 1), (2,)):
        with Journal(tmp_path / "a", 40, ATTRIBUTES, columns=columns) as journal:
            for i in rows:
                block = blocks()[i]
                block.truth["psf"] = np.full(len(block.quantum), float(i))
                journal.add(block)
            if rows == (2,):
                journal.finish()
    with Dataset(tmp_path / "a") as a:
        assert list(a.truth["psf"]) == [0.0] * 16 + [1.0] * 16 + [2.0] * 8


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    with Journal(tmp_path / "a", 40, ATTRIBUTES) as journal:
        for block in blocks():
            journal.add(block)

        def full(*arguments, **options):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(dataset.h5py, "File", full)
            with pytest.raises(OutputError, match=r"No space left on device.*repeat the command"):
                journal.finish()
        assert not (tmp_path / "a").exists()
    with Journal(tmp_path / "a", 40, ATTRIBUTES) as journal:
        assert journal.missing() == []
        assert journal.finish() == tmp_path / "a"


@pytest.mark.parametrize("rms", [0.0, 1e-12, np.inf, np.nan])
def test_stamps_that_integers_cannot_hold_are_refused(rms):
    """As of noise that was brought to the zero point of the simulation from a wrong one."""
    truth = {"rms": np.array([0.003, rms])}
    with pytest.raises(DatasetError, match=r"stamp 17 has 1, with a noise of .*\. Check the zero point"):
        pack(16, np.ones((2, 128, 128), np.float32), truth)


def test_bad_files_are_refused(tmp_path, small_dataset):
    with pytest.raises(DatasetError, match="there is none"):
        Dataset(tmp_path / "nothing.h5")
    (tmp_path / "text.h5").write_text("no")
    with pytest.raises(DatasetError, match="not a complete HDF5 file, as `sersicnet simulate` writes"):
        Dataset(tmp_path / "text.h5")
    cut = tmp_path / "cut.h5"
    cut.write_bytes(small_dataset.read_bytes()[:5000])
    with pytest.raises(DatasetError, match="not a complete HDF5 file"):
        Dataset(cut)
    with h5py.File(tmp_path / "old.h5", "w") as file:
        file.attrs["schema_version"] = 99
    with pytest.raises(DatasetError, match="schema 99"):
        Dataset(tmp_path / "old.h5")


def test_a_damaged_block_is_named(tmp_path, small_dataset):
    damaged = tmp_path / "damaged.h5"
    damaged.write_bytes(small_dataset.read_bytes())
    with h5py.File(damaged, "r+") as file:
        file["stamps"].id.write_direct_chunk((32, 0, 0), b"nothing that zlib knows")
    with Dataset(damaged) as data:
        data.stamps(0, 32)
        with pytest.raises(DatasetError, match="stamps from row 32 cannot be read"):
            list(data.batches(10, 0, 64))


def test_threads_may_share_a_dataset(tmp_path):
    """HDF5's own reading of blocks, which h5py 3.14 does not lock, crashed."""
    data = simulate(tmp_path / "a.h5", Simulation(960, seed=1), workers=2, command="simulate")
    with Dataset(data) as shared, ThreadPoolExecutor(8) as threads:
        blocks = range(0, 960, BLOCK)
        alone = [shared.stamps(first, first + BLOCK) for first in blocks]
        for found, expected in zip(threads.map(lambda i: shared.stamps(i, i + BLOCK), blocks), alone, strict=True):
            np.testing.assert_array_equal(found, expected)


def test_stamps_that_another_program_stored_are_read(tmp_path, small_dataset):
    other = tmp_path / "other.h5"
    other.write_bytes(small_dataset.read_bytes())
    with h5py.File(other, "r+") as file:
        values = file["stamps"][:]
        del file["stamps"]
        file.create_dataset("stamps", data=values, chunks=(10, 64, 128))
    with Dataset(other) as data, Dataset(small_dataset) as original:
        np.testing.assert_array_equal(data.stamps(3, 40), original.stamps(3, 40))


HEADER = "image,x,y,mag,r_eff_pix,sersic_n,ellipticity\n"


@pytest.fixture
def labelled(field, tmp_path):
    """A function that writes labels.csv next to a link to the field."""
    (tmp_path / "field.fits").symlink_to(field[0])

    def write(text):
        path = tmp_path / "labels.csv"
        path.write_text(text)
        return path

    return write


def test_labels_become_stamps_and_targets(labelled, field):
    truth = field[1]
    rows = [
        f"field.fits,{r['x']},{r['y']},{r['mag']},{r['r_eff_pix']},{r['sersic_n']},{r['ellipticity']}" for r in truth
    ]
    galaxies = labels.real_galaxies(labelled(HEADER + "\n".join(rows)))
    assert len(galaxies) == len(truth)
    assert galaxies.is_real.all()
    np.testing.assert_allclose(galaxies.targets[:, 1], truth["r_eff_pix"])
    np.testing.assert_allclose(galaxies.targets[:, 0] - truth["mag"], -25.9463 + 2.5 * np.log10(0.0035), atol=0.05)


def test_labels_on_the_sky_with_radii_in_arcsec_and_axis_ratios(labelled, field):
    r = field[1][0]
    text = "ra,dec,mag,r_eff,sersic_n,q\n" + f"{r['ra']},{r['dec']},{r['mag']},0.6,2,0.25\n"
    galaxies = labels.read_labels(labelled(text), image=field[0])
    np.testing.assert_allclose(galaxies.targets[0, 1:], [10.0, 2.0, 0.75], rtol=1e-6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x,y,mag,r_eff_pix,sersic_n,ellipticity\n1,2,3,4,5,0.6\n", "needs a column image, .* with `image`"),
        ("image;x;y;mag;r_eff_pix;sersic_n;ellipticity\na;1;2;3;4;5;0.6\n", "it has image;x;y;mag"),
        ("", "needs columns mag, .* it has none"),
        ("image,x,y,mag,sersic_n,ellipticity\n", "needs a column r_eff_pix or r_eff"),
        ("image,x,dec,mag,r_eff_pix,sersic_n,q\nfield.fits,1,2,20,5,1,1\n", "both x and y, or both ra and dec"),
        (HEADER.replace("image,", "").strip() + ",image\n200,200,20,5,1,0.3\n", "line 2: image is empty"),
        (HEADER, "has no rows"),
        (
            HEADER + "field.fits,200,200,20,5,1,0.3\nfield.fits,200,900,20,5,1,0.3\n",
            "line 3: x = 200, y = 900 is outside",
        ),
        (HEADER + "field.fits,200,abc,20,5,1,0.3\n", "Column y of .* must hold numbers; line 2 has 'abc'"),
        (HEADER + "field.fits,200,200,20,5,1\n", "line 2: ellipticity should be a number"),
        (HEADER + "field.fits,200,200,20,5,1,1.2\n", "line 2: ellipticity = 1.2 is not physical"),
        (HEADER + "field.fits,200,200,20,-5,1,0.2\n", "line 2: r_eff_pix = -5 is not physical"),
        (HEADER + 2 * "field.fits,200,200,20,-5,1,0.2\n", "leave it out. 1 other row cannot be used for the same"),
        (
            HEADER.replace("ellipticity", "Q") + "field.fits,200,200,20,5,1,-0.3\n",
            r"line 2: Q = -0.3 is not physical\.",
        ),
        (
            HEADER.replace("ellipticity", "q") + "field.fits,200,200,20,5,1,\n",
            "line 2: q should be a number; received nan",
        ),
        *[
            (HEADER + f"field.fits,200,200,{mag},5,1,0.2\n", f"line 2: mag = {mag} is not physical; .* leave it out")
            for mag in (99, -99)
        ],
    ],
)
def test_bad_labels_are_named(labelled, text, message):
    with pytest.raises(DatasetError, match=message):
        labels.read_labels(labelled(text))


def test_files_that_hold_no_galaxies_are_told_what_does(small_dataset, tmp_path):
    (tmp_path / "labels.tsv").write_text("x\ty\n1\t2\n")
    with pytest.raises(DatasetError, match=r"a table \(\.fits, .*\), or a dataset .*labels.tsv is none of them"):
        labels.real_galaxies(tmp_path / "labels.tsv")
    for options in ({"image": "a.fits"}, {"zero_point": 25.0}):
        with pytest.raises(InputError, match=r"`image` and `zero_point` are for tables and images; .* is a dataset"):
            labels.real_galaxies(small_dataset, **options)


def test_fits_that_left_the_image_are_no_labels(labelled):
    header = HEADER.strip() + ",fit_status,snr\n"
    inside, outside = (f"field.fits,200,{y},20,5,1,0.3,0,{snr}\n" for y, snr in ((200, 30), (900, 40)))
    galaxies = labels.read_labels(labelled(header + outside + inside))
    assert len(galaxies) == 1
    assert galaxies.snr.tolist() == [30]
    with pytest.raises(DatasetError, match="table of another one"):
        labels.read_labels(labelled(header + outside))


@pytest.mark.parametrize("ending", [".csv", ".fits", ".ecsv", ".parquet", ".vot"])
def test_a_catalogue_is_a_table_of_labels_of_its_image(field, tmp_path, monkeypatch, ending):
    """It has the image as a column or in the header: by its whole path, or beside the catalogue."""
    (tmp_path / "field.fits").symlink_to(field[0])
    truth = field[1][:3]
    names = ("x", "y", "mag", "r_eff_pix", "sersic_n", "ellipticity")
    found = QTable({name: truth[name] for name in names}, meta={"IMAGE": f"{field[0]}[1]"})
    found["fit_status"] = np.zeros(3, "i4")
    path = tmp_path / f"cat{ending}"
    tables.write(tables.with_image(found, path), path)
    assert len(labels.real_galaxies(path)) == 3
    found.meta["IMAGE"] = "field.fits"
    monkeypatch.chdir(tmp_path)
    tables.write(tables.with_image(found, path), path)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert len(labels.real_galaxies(path)) == 3


def test_magnitudes_of_a_catalogue_have_its_zero_point(field, tmp_path):
    names = ("x", "y", "mag", "r_eff_pix", "sersic_n", "ellipticity")
    table = QTable({name: field[1][name][:3] for name in names}, meta={"IMAGE": str(field[0])})
    table["fit_status"] = np.zeros(3, "i4")
    tables.write(table, tmp_path / "header.fits")
    given = labels.read_labels(tmp_path / "header.fits", zero_point=21.0).targets[:, 0]
    table.meta["ZEROPT"] = 20.0
    tables.write(table, tmp_path / "stated.fits")
    stated = labels.read_labels(tmp_path / "stated.fits").targets[:, 0]
    assert stated - given == pytest.approx(1.0)
    assert labels.read_labels(tmp_path / "stated.fits", zero_point=21.0).targets[:, 0] == pytest.approx(given)


def test_the_image_of_a_catalogue_is_asked_for_if_it_is_not_known(field, tmp_path, monkeypatch):
    path = tmp_path / "cat.fits"
    names = ("x", "y", "mag", "r_eff_pix", "sersic_n", "ellipticity")
    found = QTable({name: field[1][name][:3] for name in names}, meta={"IMAGE": "field.fits"})
    tables.write(found, path)
    with pytest.raises(DatasetError, match="needs a column image"):  # what a network predicts is no label
        labels.real_galaxies(path)
    assert tables.with_image(found, tmp_path / "cat.csv") is found
    found["fit_status"] = np.zeros(3, "i4")
    tables.write(found, path)
    with pytest.raises(DatasetError, match=r"catalogue of field\.fits, and there is no such file, neither here nor"):
        labels.real_galaxies(path)
    (tmp_path / "field.fits").symlink_to(field[0])
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    (tmp_path / "other/field.fits").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"there are two of that name, here and beside the catalogue"):
        labels.real_galaxies(path)
    assert len(labels.real_galaxies(path, field[0])) == 3


def test_arrays_stream_like_a_dataset():
    arrays = Arrays(Inputs(np.zeros((40, 128, 128), np.float32)), np.zeros((40, 4)), np.zeros(40, bool), np.zeros(40))
    seen = np.concatenate([i for _, i in arrays.batches(8, 3, 40, np.random.default_rng(0))])
    assert sorted(seen) == list(range(3, 40))


def test_labels_at_a_place_without_data(labelled, field, tmp_path):
    data = mosaic.read_image(field[0]).data.copy()
    data[180:220, 180:220] = np.nan
    fits.PrimaryHDU(data, fits.Header({"MAGZERO": 25.9463})).writeto(tmp_path / "holed.fits")
    with pytest.raises(DatasetError, match=r"line 2: .* has no data"):
        labels.read_labels(labelled(HEADER + "holed.fits,200,200,20,5,1,0.3\n"))


def test_labels_in_another_encoding_are_refused(tmp_path):
    (tmp_path / "latin.csv").write_bytes("image,x\nma\u00f1ana,1\n".encode("latin-1"))
    with pytest.raises(DatasetError, match="not a CSV file in UTF-8"):
        labels.read_labels(tmp_path / "latin.csv")


def without(name):
    def change(file):
        del file[name]

    return change


def replaced(name, values):
    def change(file):
        del file[name]
        file[name] = values

    return change


def attribute(name, value):
    def change(file):
        del file.attrs[name]
        if value is not None:
            file.attrs[name] = value

    return change


def claimed(file):
    for name in ("stamps", "quantum", *(f"truth/{name}" for name in file["truth"])):
        shape = (10**11, *file[name].shape[1:])
        del file[name]
        file.create_dataset(name, shape, "f8", chunks=(1, *shape[1:]))


def linked(file):
    del file["quantum"]
    file["quantum"] = h5py.SoftLink("/nowhere")


DAMAGED = {
    "no truth": (without("truth"), "it has no truth"),
    "truth is an array": (replaced("truth", np.zeros(64)), "it has no truth"),
    "no mag": (without("truth/mag"), "it has no truth/mag"),
    "no rms": (without("truth/rms"), "it has no truth/rms"),
    "fewer mags": (replaced("truth/mag", np.zeros(9)), "truth/mag has the shape 9, not 64"),
    "mag is text": (replaced("truth/mag", ["20"] * 64), "truth/mag does not hold numbers"),
    "no quantum": (without("quantum"), "it has no quantum"),
    "fewer quanta": (replaced("quantum", np.ones(63, "f4")), "quantum has the shape 63, not 64"),
    "one quantum": (replaced("quantum", 1.0), "quantum has the shape of one number, not 64"),
    "a link to nowhere": (linked, "it has no quantum"),
    "no stamps": (without("stamps"), "it has no stamps"),
    "small stamps": (
        replaced("stamps", np.zeros((64, 64, 64), "i4")),
        "stamps has the shape 64 x 64 x 64, not N x 128",
    ),
    "empty": (replaced("stamps", np.zeros((0, 128, 128), "i4")), "not 0"),
    "flat psf": (replaced("psf", np.zeros(4)), "psf has the shape 4, not N x N x N"),
    "claims": (claimed, "stamps claims .* GB, which the file is too small to hold"),
    "no config": (attribute("config", None), "it has no attribute config"),
    "odd config": (attribute("config", "[1]"), "its attribute config is not what a simulation writes"),
    "config cut short": (attribute("config", '{"a": '), "its attribute config is not"),
    "no versions": (attribute("versions", None), "it has no attribute versions"),
    "no zero point": (attribute("zero_point", None), "it has no attribute zero_point"),
    "no pixel scale": (attribute("pixel_scale", "wide"), "its attribute pixel_scale is not a number"),
    "several schemas": (attribute("schema_version", [1, 1]), r"has dataset schema \[1 1\]"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_dataset_without_a_part_is_one_line(tmp_path, small_dataset, kind):
    change, message = DAMAGED[kind]
    path = tmp_path / "a.h5"
    path.write_bytes(small_dataset.read_bytes())
    with h5py.File(path, "r+") as file:
        change(file)
    with pytest.raises(DatasetError, match=message) as caught:
        Dataset(path)
    assert "\n" not in str(caught.value)
    path.unlink()  # it is closed


def test_what_a_dataset_does_not_say_of_itself_is_one_line(tmp_path, small_dataset):
    path = tmp_path / "a.h5"
    path.write_bytes(small_dataset.read_bytes())
    with h5py.File(path, "r+") as file:
        file.attrs["config"] = "{}"
    with Dataset(path) as data, pytest.raises(DatasetError, match="it has no instrument"):
        _ = data.config["instrument"]


@pytest.mark.parametrize("passes", [1, 2])
def test_networks_are_shown_the_correlation_of_the_noise_of_a_set(tmp_path, passes):
    instrument = replace(F160W, noise_passes=passes)
    with Dataset(simulate(tmp_path / "set.h5", Simulation(4, instrument=instrument), workers=1)) as data:
        shown = data.inputs(0, 4).noise
        expected = noise_numbers(instrument.correlation, instrument.exposure * data.truth["rms"])
        assert shown == pytest.approx(expected)
