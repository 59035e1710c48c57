"""Roads from simulated galaxies to those of another domain, compared.

``python benchmarks/adaptation.py SIMULATED REAL TEST_SIMULATED TEST_REAL [--matched MATCHED] [options]``

All are datasets; REAL stands for the galaxies of a survey, MATCHED for simulations
that look like them (PSF, noise, neighbours, prior). Every way begins at the same
weights and takes as many steps of as many stamps at the same learning rate, as
nearly as whole epochs allow:

- simulated: training on without anything of the other domain, to compare with;
- matched: the same with MATCHED in the place of SIMULATED;
- dann, daregram: SIMULATED and REAL with their features aligned, once without the
  labels of REAL and once with them;
- matched, dann and matched, daregram: MATCHED and REAL, without labels;
- fine-tuned: REAL with its labels alone.

Printed are, as a Markdown table, R² on both test sets, the accuracy of a linear
classifier that tells them apart by the features (0.5 when it cannot), and the time
beside that of the first way: of all cores together without a GPU, else on the clock.
Each way's weights are kept in FOLDER, and used again when they are there.
"""

import argparse
import json
import time
from contextlib import ExitStack
from dataclasses import replace
from math import ceil
from pathlib import Path

from sersicnet import dataset, weights
from sersicnet.catalogue.scores import scores
from sersicnet.evaluating.domains import domain_accuracy
from sersicnet.networks import features, shown
from sersicnet.schema import TARGET_NAMES
from sersicnet.training.device import device
from sersicnet.training.finetune import finetune
from sersicnet.training.labels import real_galaxies
from sersicnet.training.losses import ALIGNMENTS
from sersicnet.training.recipe import ADAPT
from sersicnet.training.train import train


def ways(arguments, network, epochs):
    """Name -> (steps an epoch, function of output, recipe and report that trains)."""
    real = real_galaxies(arguments.real)
    recipe = ADAPT[network]

    def drawn(data):
        with dataset.Dataset(data) as opened:
            n = len(opened) if recipe.faint_limit > 30 else int((opened.mag <= recipe.faint_limit).sum())
        return min(n, arguments.limit or n) * 9 // 10

    def trained(data, **options):
        rows = drawn(data)
        if "adapt" in options:
            rows += len(real) * 4 // 5 if options["real_labels"] else len(real)
            options["real"] = real

        def run(output, recipe, report):
            return train(
                data, output, network=network, start=arguments.start, limit=arguments.limit, seed=arguments.seed,
                recipe=recipe, report=report, command="benchmarks/adaptation.py", **options,
            )  # fmt: skip

        return ceil(rows / recipe.batch), run

    def tuned(output, recipe, report):
        return finetune(
            real, output, base=arguments.start, layers="all", seed=arguments.seed, recipe=recipe, report=report,
            command="benchmarks/adaptation.py",
        )  # fmt: skip

    found = {"simulated": trained(arguments.simulated)}
    if arguments.matched:
        found["matched"] = trained(arguments.matched)
    for labels, words in ((False, "without labels"), (True, "with labels")):
        for adapt in ALIGNMENTS:
            found[f"{adapt}, {words}"] = trained(arguments.simulated, adapt=adapt, real_labels=labels)
    if arguments.matched:
        for adapt in ALIGNMENTS:
            found[f"matched, {adapt}, without labels"] = trained(arguments.matched, adapt=adapt, real_labels=False)
    found["fine-tuned"] = ceil(len(real) * 4 / 5 / recipe.batch), tuned
    steps = epochs * found["dann, without labels"][0]
    return {
        name: (run, replace(recipe, epochs=max(1, round(steps / each)), patience=10**6))
        for name, (each, run) in found.items()
    }


def measured(found, test):
    """R² of each parameter, and the features of at most 3,000 galaxies."""
    inputs, model = test.inputs(0, len(test)), features(found.keras_model())
    r2 = scores(test.targets, found.predict(inputs)[0], mag=test.mag)["all"]["r2"]
    return r2, model.predict(shown(model, inputs.taken(slice(3000))), verbose=0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("simulated", "real", "test_simulated", "test_real"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--matched", type=Path)
    parser.add_argument("--start", default=weights.BASE, help="weights that every way begins at")
    parser.add_argument("--limit", type=int, help="stamps of SIMULATED and MATCHED to use")
    parser.add_argument("--epochs", type=int, default=10, help="of dann without labels; all take as many steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("adaptation"))
    arguments = parser.parse_args()
    arguments.folder.mkdir(exist_ok=True)
    start = weights.load(arguments.start)
    clock = time.process_time if "no GPU" in device() else time.monotonic
    head = [f"{name} ({domain})" for domain in ("simulated", "real") for name in TARGET_NAMES]
    print("| way | steps | time | " + " | ".join(head) + " | domains told apart |")
    print("|" + "---|" * (4 + len(head)))
    first = None
    with ExitStack() as stack:
        tests = [stack.enter_context(dataset.Dataset(p)) for p in (arguments.test_simulated, arguments.test_real)]
        for name, way in {"start": None, **ways(arguments, start.card["network"], arguments.epochs)}.items():
            cost, found = {"steps": 0, "seconds": 0.0}, start
            if way is not None:
                run, recipe = way
                output = arguments.folder / name.replace(", ", "-").replace(" ", "-")
                kept = output.with_suffix(".json")
                if output.exists():
                    found, cost = weights.load(output), json.loads(kept.read_text())
                else:
                    began, seen = clock(), []
                    found = run(output, recipe, lambda p, seen=seen: p.record is None and seen.append(1))
                    cost = {"steps": len(seen), "seconds": clock() - began}
                    kept.write_text(json.dumps(cost))
                first = first or cost["seconds"]
            both = [measured(found, test) for test in tests]
            told = domain_accuracy(*(seen for _, seen in both))
            cells = [f"{r2[n]:.4f}" for r2, _ in both for n in TARGET_NAMES]
            ratio = f"{cost['seconds'] / first:.2f}" if first else ""
            print(f"| {name} | {cost['steps']} | {ratio} | {' | '.join(cells)} | {told['accuracy']:.3f} |", flush=True)


if __name__ == "__main__":
    main()
