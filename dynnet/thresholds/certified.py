"""Risk that is certified: an exact binomial test along a fixed sequence of thresholds, from "never exit" to cheaper.

A sample is harmed, or it is not; of n samples, k are. Were the risk above alpha, so few would be harmed with a
probability of at most P[Bin(n, alpha) <= k]. Thresholds are tried in an order that was fixed before the samples were
looked at, as long as that probability is at most delta: then the last one that passed has a risk of at most alpha, with
probability 1 - delta over the samples (Bauer, "Multiple testing in clinical trials", 1991; Angelopoulos et al., "Learn
then Test", https://arxiv.org/abs/2110.01052; for early exits Jazbec et al., "Fast yet Safe",
https://arxiv.org/abs/2405.20915).

    n samples, k of them harmed
"""

from __future__ import annotations

import math
from collections.abc import Sequence

_NOTHING = 1e-18  # of a sum
_MOST = 10**9


def p_value(failures: int, samples: int, risk: float) -> float:
    """P[Bin(n, risk) <= k]: how likely so few failures were, were the risk as large as that."""
    if failures >= samples:
        return 1.0
    total = 0.0
    for k in range(failures, -1, -1):
        # In logarithms: the first terms are far below the smallest float where n is large.
        term = math.exp(
            math.lgamma(samples + 1) - math.lgamma(k + 1) - math.lgamma(samples - k + 1)
            + k * math.log(risk) + (samples - k) * math.log1p(-risk)
        )  # fmt: skip
        total += term
        if k < samples * risk and term < total * _NOTHING:  # below the mean they only fall
            break
    return min(1.0, total)


def safe_steps(failures: Sequence[int], samples: int, risk: float, delta: float) -> int:
    """How many steps of a sequence pass, one after the other; none after the first that does not.

    Args:
        failures: of each step, in an order that was fixed before.
        samples: n, the same ones for all steps.
        risk, delta: as in `dynnet.certificate.Certificate`.
    """
    for step, count in enumerate(failures):
        if p_value(count, samples, risk) > delta:
            return step
    return len(failures)


def samples_needed(risk: float, delta: float, rate: float = 0.0) -> int:
    """So many samples certify a risk if this share of them fails, below the risk; hardly fewer do. 0 where it would
    take more than a billion."""

    def passes(samples: int) -> bool:
        return p_value(math.ceil(rate * samples), samples, risk) <= delta

    enough = 1
    while not passes(enough):
        if enough > _MOST:
            return 0
        enough *= 2
    fails = enough // 2
    while enough - fails > 1:
        middle = (fails + enough) // 2
        fails, enough = (fails, middle) if passes(middle) else (middle, enough)
    return enough
