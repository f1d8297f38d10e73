"""The simulation of a service, held against what is known of queues; and the load test that feeds it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import dynnet
from eval import capacity, load
from eval.capacity import handling_of, overhead_of, planned, read_load
from eval.queueing import Costs, Service, simulated

DIGITS = Path(__file__).parents[2] / "docs" / "images" / "digits"
NONE = np.zeros(1)


def fixed(ms: float, batch: int = 1) -> Costs:
    """A model without exits that takes so long for every image of a batch."""
    return Costs(np.arange(batch + 1)[:, None] * ms, 0.0, np.zeros(1, dtype=int))


@pytest.mark.parametrize("busy", [0.3, 0.7])
def test_one_replica_is_a_queue_with_fixed_service(busy: float) -> None:
    """M/D/1, Pollaczek and Khinchine: the mean wait is busy x service / (2 (1 - busy))."""
    service = 2.0
    found = simulated(fixed(service), 1e3 * busy / service, Service(1, 1, 0.0, 10**6), NONE, 200.0, seed=0)
    assert found.latency_ms.mean() == pytest.approx(service + busy * service / (2 * (1 - busy)), rel=0.05)
    assert found.busy == pytest.approx(busy, rel=0.03)
    assert found.latency_ms.min() >= service - 1e-9


def test_the_first_of_a_batch_waits_for_others_and_no_longer() -> None:
    service = Service(1, 8, 5.0, 100)
    lonely = simulated(fixed(1.0, 8), 1.0, service, NONE, 100.0, seed=0)
    assert np.median(lonely.latency_ms) == pytest.approx(6.0)
    crowded = simulated(fixed(1.0, 8), 700.0, service, NONE, 20.0, seed=0)
    assert crowded.latency_ms.min() >= 1.0
    assert crowded.busy == pytest.approx(0.7, rel=0.05)
    assert not crowded.refused


def test_more_than_replicas_bear_is_refused_and_what_waits_is_bounded() -> None:
    found = simulated(fixed(1.0, 4), 2000.0, Service(1, 4, 0.0, 20), NONE, 10.0, seed=0)
    assert found.refused == pytest.approx(10_000, rel=0.05)
    assert found.latency_ms.max() <= 20 + 2 * 4 + 1e-6
    assert found.busy == pytest.approx(1.0, rel=0.01)


def test_images_pay_for_the_stages_that_they_reach() -> None:
    costs = Costs(np.array([[0.0, 0.0], [1.0, 2.0], [1.5, 3.0], [2.0, 4.0]]), 0.1, np.array([0, 1]))
    assert costs.batch_ms(np.array([0])) == pytest.approx(1.1)
    assert costs.batch_ms(np.array([1])) == pytest.approx(3.1)
    assert costs.batch_ms(np.array([0, 0, 1])) == pytest.approx(2.0 + 2.0 + 0.3)


def test_a_plan_has_the_fewest_replicas_that_keep_it() -> None:
    service = Service(1, 1, 0.0, 10**6)
    told = planned("fixed", fixed(4.0), 1000.0, 20.0, service, NONE, 5.0, seed=0)
    assert told["replicas"] >= 5  # four are busy all the time
    assert told["p99_ms"] <= 20.0
    fewer = simulated(fixed(4.0), 1000.0, service._replace(replicas=told["replicas"] - 1), NONE, 5.0, seed=0)
    assert np.quantile(fewer.latency_ms, 0.99) > 20.0


def test_the_overhead_is_what_lone_requests_took_beyond_their_stages() -> None:
    tested = [{"rate": 50, "latencies_ms": [99.0]}, {"rate": 5, "latencies_ms": [9.0, 10.0, 1.0]}]
    assert overhead_of(fixed(3.0, 2), tested, wait_ms=2.0).tolist() == [4.0, 5.0, 0.0]


def test_the_handling_is_what_answers_take_beyond_their_stages_where_a_replica_is_overrun() -> None:
    takes = {"fixed": Costs(np.array([[0.0], [2.0], [3.0], [4.0], [4.0]]), 0.5, np.zeros(8, dtype=int))}
    below = {"rate": 10, "throughput": 10.0, "refused": 0}
    above = {"rate": 900, "throughput": 400.0, "refused": 3}  # 2.5 ms each, of which 1 + 0.5 are known
    assert handling_of(takes, {"fixed": [below, above]}, 4) == pytest.approx(1.0)
    assert handling_of(takes, {"fixed": [below]}, 4) == 0.0


@pytest.mark.sweep
def test_a_load_test_feeds_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("litserve")
    dynnet.export(dynnet.create_model("digits"), tmp_path / "stages")
    models, figures = [f"digits={tmp_path / 'stages'}"], tmp_path / "load.json"
    load.main(DIGITS, models, [10.0, 40.0], seconds=1.0, server="litserve", check=3, port=8799, json=figures)
    said = capsys.readouterr().out
    assert "digits: 3 answers are the runner's" in said
    found = read_load(figures)["loaded"]
    assert [(one["rate"], one["answered"]) for one in found] == [(10.0, 10), (40.0, 40)]
    capacity.main(DIGITS, models, load=figures, json=tmp_path / "compared.json")
    assert [row["rate"] for row in json.loads((tmp_path / "compared.json").read_text())] == [10.0, 40.0]
    capacity.main(DIGITS, models, rate=500.0, seconds=1.0)
    assert "requests a second" in capsys.readouterr().out


def test_what_cannot_be_loaded_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for images, models, words in (
        (tmp_path, ["a=b"], "no images in"),
        (DIGITS, ["stages"], "give NAME=FOLDER of an exported model"),
        (DIGITS, [f"a={tmp_path}"], "does not start"),
    ):
        with pytest.raises(SystemExit):
            load.main(images, models, [1.0], server="litserve", port=8798)
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        capacity.main(DIGITS, ["a=b"])
    assert "nothing to do; give --rate" in capsys.readouterr().err
    (tmp_path / "load.json").write_text("{}")
    with pytest.raises(SystemExit):
        capacity.main(DIGITS, ["a=b"], load=tmp_path / "load.json")
    assert "holds no figures of eval.load" in capsys.readouterr().err
