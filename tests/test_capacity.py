"""How many replicas a load needs: the model against a replica that is simulated step by step."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest

from load_tests.capacity import Costs, main, read_costs, replicas

MEASURED = Costs(base_s=0.003, row_s=0.003, around_s=0.009, rows=16)
STEPS = 12


def simulated(costs: Costs, rate: float, images: int = 4000) -> np.ndarray:
    """Latencies of images that arrive at random and join the batch between two steps, as in the
    engine's loop.
    """
    draw, now, latencies = random.Random(0), 0.0, []
    arrivals = np.cumsum([draw.expovariate(rate) for _ in range(images)]).tolist()
    waiting, running = arrivals[::-1], []
    while waiting or running:
        if not running:
            now = max(now, waiting[-1])
        while waiting and waiting[-1] <= now and len(running) < costs.rows:
            now += costs.around_s
            running.append([waiting.pop(), STEPS])
        now += costs.step(len(running))
        running = [[arrived, left - 1] for arrived, left in running]
        latencies += [now - arrived for arrived, left in running if not left]
        running = [row for row in running if row[1]]
    return np.array(latencies)


@pytest.mark.parametrize(
    "costs", [MEASURED, Costs(0.0005, 0.0055, 0.009, 16), Costs(0.02, 0.001, 0.01, 16)]
)
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_the_mean_is_what_the_model_says_and_the_p95_no_more(costs: Costs, share: float) -> None:
    rate = share * costs.saturated(STEPS)
    latencies = simulated(costs, rate)
    assert latencies.mean() == pytest.approx(costs.mean(rate, STEPS), rel=0.1)
    assert np.quantile(latencies, 0.95) <= costs.p95(rate, STEPS) * 1.03
    assert costs.p95(rate, STEPS) <= 2 * np.quantile(latencies, 0.95)


def test_a_replica_does_what_its_saturation_says() -> None:
    images = 400
    beyond = simulated(MEASURED, 100 * MEASURED.saturated(STEPS), images)
    assert images / beyond.max() == pytest.approx(MEASURED.saturated(STEPS), rel=0.1)


def test_the_most_that_keeps_to_a_p95_keeps_to_it_and_little_more_does_not() -> None:
    rate = MEASURED.rate(STEPS, p95=0.3)
    assert MEASURED.p95(rate, STEPS) == pytest.approx(0.3)
    assert MEASURED.p95(1.01 * rate, STEPS) > 0.3
    assert math.isinf(MEASURED.p95(MEASURED.saturated(STEPS), STEPS))
    assert MEASURED.rate(STEPS, p95=1e9) < MEASURED.saturated(STEPS)


def test_twice_the_load_takes_twice_the_replicas_and_spares_come_on_top() -> None:
    one = MEASURED.rate(STEPS, p95=0.5)
    assert [replicas(MEASURED, n * one * 0.999, STEPS, 0.5) for n in (1, 2, 4)] == [1, 2, 4]
    assert replicas(MEASURED, one * 0.999, STEPS, 0.5, spare=2) == 3
    assert replicas(MEASURED, 0.0, STEPS, 0.5) == 1


def test_no_number_of_replicas_makes_one_image_faster() -> None:
    with pytest.raises(ValueError, match="idle replica"):
        replicas(MEASURED, 1.0, STEPS, p95=0.05)


def test_costs_are_the_line_through_what_was_measured() -> None:
    costs = Costs.fitted(
        {rows: MEASURED.step(rows) for rows in (1, 2, 4, 8, 16)}, MEASURED.around_s
    )
    assert costs.base_s == pytest.approx(MEASURED.base_s)
    assert costs.row_s == pytest.approx(MEASURED.row_s)
    assert costs.rows == 16


def test_the_command_answers_from_a_measurement(
    tmp_path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "measured.json"
    steps = {str(rows): 1000 * MEASURED.step(rows) for rows in (1, 4, 16)}
    path.write_text(json.dumps({"step_ms": steps, "around_ms": 9.0}) + "\n")
    assert read_costs(path).step(8) == pytest.approx(MEASURED.step(8))
    main(["--costs", str(path), "--arrivals", "40", "--p95", "0.5", "--spare", "1"])
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["replicas"] == replicas(MEASURED, 40, STEPS, 0.5, spare=1)
    assert answer["p95_s"] <= 0.5
    with pytest.raises(SystemExit, match="idle replica"):
        main(["--costs", str(path), "--p95", "0.01"])
