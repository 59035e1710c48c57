"""The card of weights as a page: what a user reads of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sersicnet.errors import WeightsError, counted, first_line
from sersicnet.schema import N_TARGETS, TARGETS


def duration(seconds: float) -> str:
    """Seconds, or minutes, in words."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} minutes"


def readable(card: Mapping[str, Any]) -> str:
    """The card as a Markdown page.

    Raises
    ------
    WeightsError
        If the card lacks what the page shows.
    """
    try:
        return _page(card)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WeightsError(
            f"The card of {card['name']} cannot be shown: {type(error).__name__}, {first_line(error)}. "
            "Train the weights again."
        ) from error


def _page(card: Mapping[str, Any]) -> str:
    domain = card["domain"]
    ranges = ", ".join(f"{name} {low:g} to {high:g}" for name, (low, high) in domain["ranges"].items())
    made = card.get("calibrated")
    lines = [
        f"# {card['name']}",
        "",
        card["summary"],
        "",
        f"- network: `{card['network']}`, {card['parameters']:,} weights; licence {card['licence']}",
        f"- images: {_images(domain)}",
        f"- trained on: {ranges}",
        f"- data: {card['data']['n']:,} stamps, `{card['data']['command']}`",
        *([f"- adapted to: {found['n']:,} stamps, `{found['command']}`"] if (found := _adapted(card)) else []),
        f"- command: `{card['command']}`, seed {card['seed']}",
        *[f"- begun at: `{base['name']}`, made by `{base['command']}`" for base in _bases(card)],
        f"- training: {counted(card['training']['epochs'], 'epoch')}, {duration(card['training']['seconds'])} "
        f"on {card['training']['device']} ({card['training']['backend']})",
        *([f"- calibrated on: {made['data']['n']:,} stamps, by `{made['command']}`"] if made else []),
        "",
    ]
    if card.get("scores"):
        lines += [f"Scores on {card['scores']['test_set']}:", "", scores_table(card["scores"]["samples"]), ""]
    lines += ["## Limits", ""]
    lines += [f"- {limit}" for limit in card["limits"]]
    return "\n".join(lines) + "\n"


def _images(domain: Mapping[str, Any]) -> str:
    """The images of a domain, in words."""
    if domain.get("telescopes"):
        (narrow, wide), (least, most) = domain["psf"]["fwhm"], domain["correlation"]
        return (
            f"{domain['instrument']}, at any pixel scale and depth; PSF FWHM {narrow:g} to {wide:g} pixels, noise of "
            f"large apertures {least:.2f} to {most:.2f} times that of independent pixels; magnitudes are relative to "
            "the rms of a pixel"
        )
    narrow, wide = domain.get("psf_fwhm_range") or (domain["psf_fwhm"],) * 2
    scatter = f" ({narrow:.3f} to {wide:.3f})" if wide > narrow else ""
    return (
        f"{domain['instrument']}; {domain['pixel_scale']:.6g} arcsec/pixel, PSF FWHM {domain['psf_fwhm']:.3f} "
        f"arcsec{scatter}, pixel rms {domain['rms'][0]:g} to {domain['rms'][1]:g} at zero point "
        f"{domain['zero_point']:.6g} (AB)"
    )


def _adapted(card: Mapping[str, Any]) -> Mapping[str, Any]:
    return card.get("adaptation", {}).get("data", {})  # type: ignore[no-any-return]


def _bases(card: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """What the weights were trained on from, and what that was, back to random ones."""
    while base := card.get("base"):
        if "command" in base:
            yield base
        card = base


def scores_table(samples: Mapping[str, Any]) -> str:
    """Scores of `sersicnet.catalogue.scores.scores`, a Markdown table."""
    lines = ["| sample | N | | " + " | ".join(t.name for t in TARGETS) + " |", "|" + "---|" * (3 + N_TARGETS)]
    for sample, found in samples.items():
        for quantity, label in (
            ("r2", "R²"),
            ("bias", "median error"),
            ("scatter", "68 % scatter"),
            ("coverage", "within 1 sigma"),
        ):
            if quantity in found:
                values = " | ".join(f"{found[quantity][t.name]:.4f}" for t in TARGETS)
                lines.append(f"| {sample} | {found['n']} | {label} | {values} |")
    return "\n".join(lines)
