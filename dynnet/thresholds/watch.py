"""A watch over a certified risk: it tells when the risk no longer holds, from a share of the answers that is audited.

For some answers of early exits the full model is asked as well. Were the risk at most alpha, the evidence below would
be one of many fair bets, of which at most a share of delta ever reaches 1 / delta, however long one watches (Ville's
inequality; Ramdas et al., "Game-theoretic statistics and safe anytime-valid inference",
https://arxiv.org/abs/2210.01948). It bets on a few larger risks at once, and on their beginning now as well as on
their having been there from the start.

What is audited is told by `dynnet.thresholds.auditing.audited` or, of an exported model, by `Runner.audit`. No torch.
"""

from __future__ import annotations

from collections.abc import Iterable

from dynnet.errors import CalibrationError

_BETS = {1.5: 0.25, 3.0: 0.5, 6.0: 0.25}  # risks in multiples of alpha, and what is put on each
_FIRST = 0.5  # what is put on the very beginning
_LATER = 1000  # answers after which half of the rest has been put on something


class Watch:
    """Evidence that more answers are harmed than was certified.

    >>> watch = Watch(risk=0.01)
    >>> watch.see([False] * 1000), watch.see([True, False] * 20)
    (False, True)

    Args:
        risk: alpha, the certified share of harmed answers.
        delta: the probability of an alarm, ever, while the risk holds.

    Attributes:
        evidence: an alarm is given once it has reached 1 / delta.
        audited, failures: answers seen, and those of them that were harmed.
        alarm: was there one?
    """

    def __init__(self, risk: float, delta: float = 0.05) -> None:
        if not (0 < risk < 1 and 0 < delta < 1):
            raise CalibrationError(f"risk={risk}, delta={delta}: give two shares in (0, 1)")
        self.risk, self.delta = risk, delta
        self.audited = self.failures = 0
        self.evidence, self.alarm = 1.0, False
        self._bets = [(min(times * risk, (1 + risk) / 2), share) for times, share in _BETS.items()]
        self._running = [0.0] * len(self._bets)
        self._unspent = 1.0

    def see(self, harmed: Iterable[bool]) -> bool:
        """Take answers into account, in their order; True once there was an alarm.

        Args:
            harmed: of audited answers, drawn at random from all, as the certified risk is a share of all; one that the
                last exit gave is not harmed, and costs nothing to audit.
        """
        for failed in harmed:
            self.audited += 1
            self.failures += bool(failed)
            left = (1 - _FIRST) / (1 + self.audited / _LATER)
            stake, self._unspent = self._unspent - left, left
            for i, (rate, share) in enumerate(self._bets):
                odds = rate / self.risk if failed else (1 - rate) / (1 - self.risk)
                self._running[i] = odds * (self._running[i] + share * stake)
            self.evidence = sum(self._running) + self._unspent
            self.alarm = self.alarm or self.evidence >= 1 / self.delta
            if self.alarm:
                break
        return self.alarm
