import re

import pytest

from sersicnet.catalogue.chosen import check, chosen, wanted
from sersicnet.errors import InputError
from sersicnet.schema import COLUMNS, CORRELATIONS, GROUPS

EVERY = [column.name for column in COLUMNS]
DEFAULT = [column.name for column in COLUMNS if not column.group]


def test_nothing_means_the_columns_by_default():
    assert wanted("") == wanted(()) == ()
    assert chosen((), EVERY) == DEFAULT


def test_names_replace_the_columns_and_come_in_the_order_of_the_catalogue():
    assert chosen(wanted("mag, id"), EVERY) == ["id", "mag"]
    assert chosen(wanted(["mag", "correlations"]), EVERY) == ["mag", *CORRELATIONS]
    assert chosen(wanted("all"), EVERY) == EVERY


def test_names_with_a_plus_are_added():
    assert chosen(wanted("+correlations,+x_err"), EVERY) == [
        name for name in EVERY if name in (*DEFAULT, "x_err", *CORRELATIONS)
    ]
    assert chosen(wanted("+all"), EVERY) == EVERY
    assert chosen(wanted("+mag"), EVERY) == DEFAULT


def test_what_a_catalogue_cannot_have_is_left_out_of_groups():
    have = [name for name in EVERY if not name.startswith("r_eff_p")]
    found = chosen(wanted("quantiles"), have)
    assert found == [f"{name}_p{share}" for name in ("sersic_n", "ellipticity") for share in (16, 50, 84)]
    check(wanted("quantiles"), have)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("id,r_ef", "received 'r_ef'. Is it r_eff"),
        ("+quantile", "received 'quantile'. Is it quantiles"),
        ("id,", "received ''"),
        ("id;mag", "received 'id;mag'"),
        ("id,+mag", "or replaces them, without; received id,+mag."),
    ],
)
def test_names_that_mean_nothing_are_refused(columns, message):
    with pytest.raises(InputError, match=re.escape(message)):
        wanted(columns)


@pytest.mark.parametrize(
    ("columns", "missing", "needs"),
    [
        ("ra", ("ra", "dec", "pa", "ra_err", "dec_err"), "a WCS"),
        ("id,r_eff", ("r_eff", "r_eff_err", "mu_mean"), "a pixel scale"),
        ("+surface_brightness", ("r_eff", "mu_mean", "mu_mean_err"), "a pixel scale"),
        ("+correlations", CORRELATIONS, "weights that predict the correlations of errors, or fits"),
        ("mag_err", ("mag_err",), "weights that predict errors, or fits"),
        ("chi2", ("sky", "chi2", "fit_status"), "fits"),
        ("parent", ("parent",), "detections instead of positions"),
        ("image", ("image",), "one catalogue of several images"),
        ("mag_limit", ("mag_limit",), "positions, several bands or fits"),
    ],
)
def test_columns_that_a_run_cannot_have_are_refused_with_the_reason(columns, missing, needs):
    have = [name for name in EVERY if name not in missing]
    with pytest.raises(InputError, match=re.escape(f"which needs {needs}. Leave it out.")):
        check(wanted(columns), have)


def test_every_group_has_columns_of_its_own():
    assert len(GROUPS) == len(set(GROUPS)) == 4
    assert not set(GROUPS) & set(EVERY)
