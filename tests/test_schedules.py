"""AFA's learning rates against the published optimiser: every rate, and what AdamW makes of the weights."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from reference.naive_attention import formula_weight
from safetensors.torch import load_file

from wsss_lib.training.schedules import warmup_poly

GOLDEN = Path(__file__).parent / "golden"
FACTS = json.loads((GOLDEN / "afa_schedule.json").read_text())  # 30 steps of a run of 25
SETTINGS = FACTS["config"]
RUN = {"steps": SETTINGS["mx"], "warmup": SETTINGS["warm"], "power": SETTINGS["power"],
       "start": SETTINGS["ratio"]}
RATES = [SETTINGS["lr"], 0.0, 10 * SETTINGS["lr"]]  # encoder, its norms, heads


def test_published_rates():
    """Of 30 steps; from the 25th on they stay. Double precision on both sides: the order of two products."""
    for step, rates in enumerate(FACTS["lr"]):
        factor = warmup_poly(step, **RUN, published=True)
        assert [base * factor for base in RATES] == pytest.approx(rates, rel=1e-14, abs=0)


def test_adamw_at_these_rates_makes_the_published_weights():
    golden = load_file(GOLDEN / "afa_schedule.safetensors")
    weights = [torch.nn.Parameter(golden[f"in.p{i}"].clone()) for i in range(3)]
    groups = [{"params": [weight], "lr": rate} for weight, rate in zip(weights, RATES)]
    groups[1]["weight_decay"] = 0.0
    optimizer = torch.optim.AdamW(groups, weight_decay=SETTINGS["wd"], betas=(0.9, 0.999))
    for step, expected in enumerate(golden["out.params_after_step"]):
        for group, rate in zip(optimizer.param_groups, RATES):
            group["lr"] = rate * warmup_poly(step, **RUN, published=True)
        for i, weight in enumerate(weights):
            white = formula_weight(f"input.opt.g{i}.{step}", (12, 1)) / math.sqrt(3)  # gradients by name too
            weight.grad = (0.5 * torch.from_numpy(white)).float().view(3, 4)
        optimizer.step()
        for weight, wanted in zip(weights, expected):  # float32; two versions of AdamW
            torch.testing.assert_close(weight.detach(), wanted, rtol=1e-6, atol=1e-7)
    assert torch.equal(weights[1], golden["in.p1"])


def test_published_rate_jumps_at_the_end_of_the_warm_up():
    """5.4e-5 at step 9, 3.6e-5 at step 10."""
    before, after = (warmup_poly(step, **RUN, published=True) for step in (9, 10))
    assert before == pytest.approx(0.9, abs=1e-5) and after == pytest.approx(0.6)


def test_default_is_continuous():
    factors = [warmup_poly(step, **RUN) for step in range(25)]
    assert factors[0] == pytest.approx(1e-6) and factors[10] == 1  # by hand: 10 steps up, 15 down
    assert factors[:11] == pytest.approx([1e-6 + (1 - 1e-6) * step / 10 for step in range(11)])
    assert factors[10:] == pytest.approx([(25 - step) / 15 for step in range(10, 25)])
    steps = [abs(b - a) for a, b in itertools.pairwise(factors)]
    assert max(steps) == pytest.approx(0.1, abs=1e-6)  # nowhere more than a step of the warm-up
    assert factors[:10] == [warmup_poly(step, **RUN, published=True) for step in range(10)]


def test_power_and_short_runs():
    assert warmup_poly(2, 4, warmup=0, power=0.9) == pytest.approx(0.5**0.9)
    assert warmup_poly(0, 4, warmup=0) == 1 and warmup_poly(0, 1, warmup=0) == 1
    assert warmup_poly(3, 4, warmup=100, start=0.1) == pytest.approx(0.1 + 0.9 * 0.03)  # it only rises


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"step": -1}, "step: found -1"),
        ({"step": 25}, "step: found 25, expected 0..24"),
        ({"warmup": -1}, "warmup: found -1"),
        ({"power": 0}, "power: found 0"),
        ({"start": 0}, "start: found 0"),
        ({"start": 2}, "start: found 2"),
    ],
)
def test_wrong_arguments(bad, message):
    with pytest.raises(ValueError, match=message):
        warmup_poly(**{"step": 0, **RUN, **bad})
    with pytest.raises(ValueError, match="step: found -1"):
        warmup_poly(-1, 25, published=True)
