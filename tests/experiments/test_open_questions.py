"""Controls of equal cost, rules for when to insert, and the noise of merits, on a tiny setting."""

from __future__ import annotations

import numpy
import pytest
import torch
from torch.nn import functional as F

from growkernels.experiments.claims import paid_for
from growkernels.experiments.models.networks import single_network
from growkernels.experiments.sensli import flops, spirals_questions
from growkernels.experiments.sensli.engine import SettingRun, setting_data
from growkernels.experiments.sensli.settings import Insertion, Setting, Variant
from growkernels.experiments.sensli.spirals_conclusion import SpiralsEvidence, table_of
from growkernels.experiments.sensli.spirals_study import curve

EPOCHS, RUNS = 40, 6


def trained(setting: Setting) -> SettingRun:
    run = SettingRun(setting)
    while not run.done:
        run.step()
    return run


@pytest.fixture(scope="module")
def compared() -> SettingRun:
    def inserting(rule: str) -> Variant:
        return Variant(rule, 2, (Insertion(10, rule),))

    return trained(
        Setting(
            "compared", "one or three insertions", "feedforward", width=4, hidden=2, batch=90,
            rate=0.2, epochs=EPOCHS, runs=RUNS, script="none", per_class=60,
            variants=(Variant("small", 2), inserting("max"), inserting("min"),
                      Variant("scratch_1", 3)),
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def swept() -> SettingRun:
    times = (5, 15, 25)
    sweep = (Variant(f"insert_{t}", 1, (Insertion(t, "only"),)) for t in times)
    return trained(
        Setting(
            "swept", "when to insert", "feedforward", width=4, hidden=1, batch=90, rate=0.2,
            epochs=EPOCHS, runs=RUNS, script="none", per_class=60,
            variants=(Variant("small", 1), *sweep, Variant("scratch_1", 2)),
        )
    )  # fmt: skip


def test_a_control_is_told_by_its_name() -> None:
    assert paid_for("scratch_1 for the operations of max") == ("scratch_1", "operations", "max")
    assert paid_for("the best time") is None
    assert paid_for("max") is None


def test_equal_operations_are_the_first_epoch_that_is_not_cheaper(compared: SettingRun) -> None:
    setting = compared.setting
    epochs = spirals_questions.paid_epochs(compared, "scratch_1", "max", "operations")
    grown = flops.whole_flops(setting, setting.variant("max"))
    assert grown == flops.training_flops(setting, setting.variant("max")) + flops.our_merit_flops(
        setting
    )
    scratch = flops.training_flops(setting, setting.variant("scratch_1")) / EPOCHS
    assert scratch * (epochs - 1) < grown <= scratch * epochs
    assert epochs < EPOCHS
    evidence = SpiralsEvidence({"compared": compared}, table_of({"compared": compared}))
    found = evidence.runs("compared", "scratch_1 for the operations of max", "loss")
    assert list(found.values()) == curve(compared, "scratch_1")[epochs].tolist()


def test_equal_seconds_charge_the_growth(compared: SettingRun) -> None:
    fork = 10
    index = {lineage[-1].way: i for i, lineage in enumerate(compared.lineages)}
    small, scratch = index[2], index[3]
    largest = next(i for i, n in enumerate(compared.lineages) if str(n[-1].way).count("'max'"))
    compared.seconds[small], compared.seconds[scratch] = 8.0, 20.0
    compared.seconds[largest], compared.growth_seconds[largest] = 6.0, 1.5
    training, growth = spirals_questions.seconds(compared, compared.setting.variant("max"))
    assert training == pytest.approx(8.0 * fork / EPOCHS + 6.0)
    assert growth == 1.5
    epochs = spirals_questions.paid_epochs(compared, "scratch_1", "max", "seconds")
    assert epochs == int(numpy.ceil(EPOCHS * 9.5 / 20.0))
    compared.seconds[largest] = 100.0  # more than the fixed network was trained for
    assert spirals_questions.paid_epochs(compared, "scratch_1", "max", "seconds") == EPOCHS


def test_a_plateau_chooses_the_first_time_behind_it(swept: SettingRun) -> None:
    rows = swept.rows(0)
    falling, flat = torch.logspace(0, -4, EPOCHS + 1), torch.ones(EPOCHS + 1)
    swept = trained(swept.setting)
    swept.loss[:, rows] = falling[:, None]
    swept.loss[:, rows.start + 1] = flat
    swept.loss[:, rows.start + 2] = torch.cat((falling[:9], falling[8].expand(EPOCHS - 8)))
    swept.loss[3:, rows.start + 3] = torch.nan
    patience, spirals_questions.PATIENCE = spirals_questions.PATIENCE, 5
    try:
        chosen = spirals_questions.plateau_choices(swept)
    finally:
        spirals_questions.PATIENCE = patience
    # Falls to the end; flat from the start (due at 5); flat from 8 on (due at 13); diverged.
    assert chosen[:4].tolist() == [2, 0, 1, 2]


def test_merit_ratios_compare_with_autograds_gradients(swept: SettingRun) -> None:
    ratio = spirals_questions.merit_ratio(swept, "insert_15")
    merits, _, network = spirals_questions.first_insertion(swept, "insert_15")
    data = setting_data(swept.setting)
    for run in range(RUNS):
        model = single_network(network, run).double()
        F.cross_entropy(model(data.train_points.double()), data.train_labels).backward()
        weights = [p.grad for p in model.parameters() if p.ndim == 2]
        base = torch.stack([g.pow(2).sum() for g in weights if g is not None]).mean()
        assert ratio[run].item() == pytest.approx((merits[run].max() / base).item(), rel=1e-3)
    reached = torch.stack(
        [spirals_questions.merit_ratio(swept, f"insert_{t}") >= 1 for t in (5, 15, 25)]
    )
    for run, choice in enumerate(spirals_questions.merit_ratio_choices(swept).tolist()):
        places = reached[:, run].nonzero()
        assert choice == (int(places[0]) if len(places) else 2)


def test_rules_stand_for_what_their_choices_came_to(swept: SettingRun) -> None:
    evidence = SpiralsEvidence({"swept": swept}, table_of({"swept": swept}))
    losses = numpy.stack([curve(swept, f"insert_{t}")[-1].numpy() for t in (5, 15, 25)])
    fixed = evidence.runs("swept", "the fixed times", "loss")
    numpy.testing.assert_allclose(list(fixed.values()), losses.mean(axis=0), rtol=1e-6)
    choice = spirals_questions.merit_ratio_choices(swept).numpy()
    found = evidence.runs("swept", "at a merit ratio", "loss")
    numpy.testing.assert_allclose(list(found.values()), losses[choice, range(RUNS)], rtol=1e-6)


def test_noise_is_that_between_batches(
    compared: SettingRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spirals_questions, "NOISE_BATCH", 15)  # 6 batches of the 90 points
    merits, chosen, _ = spirals_questions.first_insertion(compared, "max")
    by_batch = spirals_questions.batch_merits(compared)
    assert by_batch.shape == (6, RUNS, 2)
    snr = spirals_questions.signal_to_noise(compared)
    for run in range(RUNS):
        place = int(chosen[run])
        mean, moments = merits[run, place].double(), by_batch[:, run, place].double()
        # ||mean||^2 over the variance of the mean
        variance = (moments.sum() - 6 * mean) / 5 / 6
        assert snr[run].item() == pytest.approx((mean / variance).item(), rel=1e-6)
    agreement = spirals_questions.agreement(compared)
    assert ((agreement >= 0) & (agreement <= 1)).all()
    assert agreement.mean() == (by_batch.argmax(2) == chosen).double().mean()
