"""Does a certified risk keep its promise? Thresholds fitted on many random parts of a test split, tried on the rest.

    python -m eval.risk cifar10-resnet20 cifar10-resnet56 --data path/to/cifar10 --splits 1000 --risk 0.01 --of lost
    python -m eval.risk digits --fit 200 --risk 0.05

Models are the zoo's. Their exits are asked about every test image once; the rest is drawing. A promise is broken where
more of the other images are harmed than was certified: of all splits that may be a share of delta. Then a watch is kept
over streams of these answers, drawn at random: first while the risk holds, then when it has grown threefold.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import ArgumentParser
from scipy.stats import binomtest
from tqdm import tqdm

from dynnet.certificate import Harm
from dynnet.errors import DataError
from dynnet.thresholds.answers import collect
from dynnet.thresholds.calibration import make_goal
from dynnet.thresholds.goals import Risk, sequence
from dynnet.thresholds.table import Table
from dynnet.thresholds.watch import Watch
from eval.programs import errors_told, write_json
from eval.runs import open_zoo

STREAMS, AUDITED, BEFORE = 1000, 5000, 500  # streams, answers of each, and those before a change
_GROWN = 3


@dataclass(frozen=True)
class Settings:
    """What is fitted, and on how much."""

    fit: int
    splits: int
    goal: Risk


def main(
    models: list[str],
    data: str | None = None,
    splits: int = 1000,
    fit: int = 2500,
    risk: float = 0.01,
    delta: float = 0.05,
    of: Harm = "disagreement",
    out: Path | None = None,
) -> None:
    """Try certified risks on models of the zoo.

    Args:
        models: names in the zoo.
        data: folder of their dataset, where it is not their recipe's.
        splits: how often the test images are divided.
        fit: images that thresholds are fitted on; the others judge them.
        risk, delta, of: as for `dynnet.calibrate`.
        out: a JSON file for the figures.
    """
    with errors_told():
        goal = make_goal(risk=risk, delta=delta, of=of)
        assert isinstance(goal, Risk)
        found = []
        for name in models:
            table = _asked(name, data)
            tried = _tried(table, Settings(fit, splits, goal), name)
            found.append(
                {"model": name, "of": of, "risk": risk, "delta": delta, **tried, **_watched(table, goal, name)}
            )
            print(_told(found[-1]), flush=True)
        if out is not None:
            write_json(found, out)


def _asked(name: str, data: str | None) -> Table:
    """What the exits of a model say of every test image."""
    model, loaded = open_zoo(name, data)
    bar = tqdm(loaded.loader("test", 256), desc=name, leave=False, disable=None)
    answers = collect(model, bar)
    return Table(answers, model.ledger(answers.input_size), model.measure)


def _tried(table: Table, settings: Settings, name: str) -> dict[str, Any]:
    """What became of the promise in every split."""
    if not 1 < settings.fit < table.samples:
        raise DataError(f"fit={settings.fit} of {table.samples} test images: leave some to judge")
    goal, dense = settings.goal, table.ledger.dense
    broken, macs, stayed, drops = [], [], [], []
    for split in tqdm(range(settings.splits), desc=f"{name}, splits", leave=False, disable=None):
        order = np.random.default_rng(split).permutation(table.samples)
        choice = goal.choose(table.subset(order[: settings.fit]))
        unseen = table.subset(order[settings.fit :])
        thresholds = choice.point.thresholds
        broken.append(unseen.answers.harm_at(thresholds, goal.of).mean() > goal.value)
        macs.append(unseen.point(thresholds).macs / dense)
        stayed.append(choice.verdict is not None and choice.verdict.needed is not None)
        drops.append(unseen.answers.lost(thresholds).mean())
    count = int(np.sum(broken))
    interval = binomtest(count, settings.splits).proportion_ci(0.95)  # Clopper and Pearson's
    return {
        "splits": settings.splits,
        "fit": settings.fit,
        "judged": table.samples - settings.fit,
        "broken": count / settings.splits,
        "broken_95": [float(interval.low), float(interval.high)],
        "macs_share": float(np.mean(macs)),
        "nobody_exits": float(np.mean(stayed)),
        "mean_drop": float(np.mean(drops)),
        "largest_drop": float(np.max(drops)),
    }


def _watched(table: Table, goal: Risk, name: str) -> dict[str, Any]:
    """What a watch says of streams of answers, whose risk grows or does not."""
    points = [point.thresholds for point in sequence(replace(table, harm=goal.of))]
    harms = [table.answers.harm_at(thresholds, goal.of) for thresholds in points]
    held, grown = (
        max((harm for harm in harms if harm.mean() <= times * goal.value), key=np.mean) for times in (1, _GROWN)
    )
    rng = np.random.default_rng(0)
    false, delays = 0, []
    for _ in tqdm(range(STREAMS), desc=f"{name}, streams", leave=False, disable=None):
        watch = Watch(goal.value, goal.delta)
        false += watch.see(rng.choice(held, AUDITED).tolist())
        watch = Watch(goal.value, goal.delta)
        if not watch.see(rng.choice(held, BEFORE).tolist()):
            told = watch.see(rng.choice(grown, 20 * AUDITED).tolist())
            delays.append(watch.audited - BEFORE if told else np.inf)
    return {
        "streams": STREAMS,
        "false_alarms": false / STREAMS,
        "held_risk": float(held.mean()),
        "grown_risk": float(grown.mean()),
        "median_delay": float(np.median(delays)),
    }


def _told(found: dict[str, Any]) -> str:
    low, high = found["broken_95"]
    goal = f"{found['of']} <= {found['risk']:.1%}, delta {found['delta']:.0%}"
    return (
        f"{found['model']}, {goal}, fitted on {found['fit']}: "
        f"broken in {found['broken']:.1%} of {found['splits']} splits ({low:.1%} to {high:.1%}), "
        f"{found['macs_share']:.1%} of the MACs, nobody exits in {found['nobody_exits']:.1%}; accuracy "
        f"{found['mean_drop']:+.2%} lower, {found['largest_drop']:+.2%} at worst\n"
        f"    watch over {found['streams']} streams of {AUDITED} audited answers: a false alarm in "
        f"{found['false_alarms']:.1%} at a risk of {found['held_risk']:.2%}; once that is {found['grown_risk']:.2%}, "
        f"after {BEFORE} answers, an alarm {found['median_delay']:.0f} later (median)"
    )


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    parser.add_function_arguments(main, skip={"models"})
    parser.add_argument("models", type=str, nargs="+", help="names in the zoo")
    main(**vars(parser.parse_args()))
