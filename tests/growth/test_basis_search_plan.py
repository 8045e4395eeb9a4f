"""Candidates, the planner against brute force, measured layer times, and skip schedules."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from growkernels.growth.basis_search import BasisSearch, LayerTimes, Sensitivities, SkipSchedule
from growkernels.growth.basis_search.planner import (
    CELLS,
    Option,
    cheapest_plan,
    largest_plan,
    largest_saving,
)
from growkernels.models.resnet import resnet18
from growkernels.nn import BasisConv2d, convert


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.Conv2d(8, 12, 1),
    )


def sensitivities(costs: dict[str, dict[int, float]]) -> Sensitivities:
    return Sensitivities("taylor", costs, costs, 0.0, 0.0)


def parameter_count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


class TestCandidates:
    def test_resnet18(self) -> None:
        search = BasisSearch(resnet18(width=64))
        assert len(search.candidates) == 20
        assert search.candidates["layer1.0.conv1"] == (16, 32, 48)
        assert search.candidates["conv1"] == (16,), "R of 27 taps or more saves nothing"
        assert search.candidates["layer2.0.downsample.0"] == (32,), "nor does R of 64 taps"

    def test_what_cannot_be_replaced_is_left_out(self) -> None:
        shared, conv = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
        model = nn.Sequential(
            conv, nn.Conv2d(4, 4, 3, groups=2), shared, shared, nn.Conv2d(4, 4, 3), nn.Linear(2, 2)
        )
        model[4].padding_mode = "circular"
        search = BasisSearch(model, (0.01, 0.5))
        assert search.candidates == {"0": (1, 2)}
        assert BasisSearch(net(), (0.5,), ["2"]).candidates == {"2": (4,)}

    def test_bad_input_is_one_sentence(self) -> None:
        grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.ReLU(), nn.Conv2d(2, 4, 1))
        for layers, sentence in (
            (["nowhere"], r"^There is no module 'nowhere' in the model"),
            (["1"], r"^Layer '1' cannot be a candidate: A ReLU is not a Conv2d"),
            (["0"], r"^Layer '0' cannot be a candidate: The convolution has groups=2"),
            (["2"], r"^Layer '2' cannot be a candidate: No basis form at these fractions saves"),
            ("0", r"^layers is the string '0'; give a list"),
            (None, r"^The model has no convolution that a basis convolution"),
        ):
            with pytest.raises(ValueError, match=sentence):
                BasisSearch(grouped, (0.5,), layers)
        with pytest.raises(ValueError, match=r"cannot be a candidate: It is the model itself"):
            BasisSearch(nn.Conv2d(4, 4, 3), (0.5,), [""])
        for fractions in ((), (0.0,), (0.5, 1.0), (float("nan"),)):
            with pytest.raises(ValueError, match=r"^fractions is .*between 0 and 1"):
                BasisSearch(net(), fractions)


class TestPlanner:
    option = st.builds(
        Option,
        rank=st.integers(1, 3),
        saving=st.floats(-1, 10).map(lambda v: round(v, 2)),
        cost=st.floats(-0.2, 5).map(lambda v: round(v, 2)) | st.just(math.inf),
    )
    layers = st.lists(
        st.lists(option, min_size=1, max_size=3, unique_by=lambda o: o.rank),
        min_size=1,
        max_size=5,
    )

    @staticmethod
    def all_plans(layers: list[list[Option]]) -> list[tuple[float, float]]:
        """(saving, cost) of every plan whose forms all save something."""
        choices = [[None, *(o for o in layer if o.saving > 0)] for layer in layers]
        return [
            (sum(o.saving for o in plan if o), sum(o.cost for o in plan if o))
            for plan in itertools.product(*choices)
        ]

    @staticmethod
    def value(options: dict[str, list[Option]], plan: dict[str, int]) -> tuple[float, float]:
        chosen = [next(o for o in options[path] if o.rank == rank) for path, rank in plan.items()]
        return sum(o.saving for o in chosen), sum(o.cost for o in chosen)

    @given(layers, st.floats(0.01, 1))
    def test_against_brute_force(self, layers: list[list[Option]], share: float) -> None:
        options = {str(n): layer for n, layer in enumerate(layers)}
        largest = largest_saving(options)
        plans = [plan for plan in self.all_plans(layers) if plan[1] < math.inf]
        assert largest == pytest.approx(max(saving for saving, _ in plans))
        if largest == 0:
            return
        needed, coarse = share * largest, len(layers) * largest / CELLS
        saving, cost = self.value(options, cheapest_plan(options, needed))
        assert saving >= needed * (1 - 1e-12)
        best = [c for s, c in plans if s >= needed + coarse]
        assert not best or cost <= min(best) + 1e-9

        limit = share * 5
        saving, cost = self.value(options, largest_plan(options, limit))
        assert cost <= limit + 1e-9
        assert saving >= max(s for s, c in plans if c <= limit) - coarse - 1e-9

    def test_a_greedy_choice_would_be_wrong(self) -> None:
        options = {
            "a": [Option(1, 6.0, 1.0)],  # most saving per cost, but not enough
            "b": [Option(1, 5.0, 1.0)],
            "c": [Option(1, 10.0, 1.9)],
        }
        assert cheapest_plan(options, 10.0) == {"c": 1}
        assert largest_plan(options, 1.95) == {"c": 1}
        assert largest_plan(options, 2.0) == {"a": 1, "b": 1}

    def test_a_little_too_little_is_not_enough(self) -> None:
        options = {"a": [Option(1, 9.999, 1.0)], "b": [Option(1, 10.0, 2.0)]}
        assert cheapest_plan(options, 10.0) == {"b": 1}
        assert cheapest_plan(options, 9.999) == {"a": 1}
        assert largest_plan(options, 1.999) == {"a": 1}

    def test_ties(self) -> None:
        options = {
            "a": [Option(2, 3.0, 0.0), Option(4, 3.0, 0.0)],
            "b": [Option(2, 3.0, 0.0)],
        }
        assert cheapest_plan(options, 1.0) == {"a": 4, "b": 2}, "as cheap and saves more; more R"
        tied = {"a": [Option(2, 3.0, 1.0)], "b": [Option(2, 3.0, 1.0)]}
        assert cheapest_plan(tied, 1.0) == {"a": 2}

    def test_all_layers_where_only_the_largest_saving_will_do(self) -> None:
        options = {
            name: [Option(1, 1 / 3, 1.0), Option(2, 0.1, 0.5), Option(3, 1 / 3, 0.7)]
            for name in "abcdefg"
        }
        assert cheapest_plan(options, largest_saving(options)) == dict.fromkeys("abcdefg", 3)


COSTS = {"2": {2: 0.3, 4: 0.2, 6: 0.1}, "3": {2: 0.9, 4: 0.1, 6: 0.05}, "4": {2: 0.5}}


class TestPlan:
    def test_parameters_of_the_converted_model(self) -> None:
        model = net()
        total = parameter_count(model)
        search = BasisSearch(model, (0.2, 0.5, 0.75))
        for ratio in (0.95, 0.8, 0.65, 0.5):
            plan = search.plan(sensitivities(COSTS), ratio=ratio)
            converted = copy.deepcopy(model)
            convert(converted, plan)
            assert parameter_count(converted) <= ratio * total
            assert list(plan) == sorted(plan)
        assert search.plan(sensitivities(COSTS), ratio=0.95) == {"3": 6}
        assert search.plan(sensitivities(COSTS), max_cost=0.0) == {}
        assert search.plan(sensitivities(COSTS), max_cost=0.2) == {"2": 6, "3": 4}

    def test_times_decide_where_they_are_given(self) -> None:
        search = BasisSearch(net(), (0.25, 0.5))
        costs = sensitivities({"2": {2: 0.1, 4: 0.1}, "3": {2: 0.2, 4: 0.2}})
        times = LayerTimes(
            step=10.0,
            full={"2": 3.0, "3": 3.0},
            basis={"2": {2: 3.5, 4: 2.9}, "3": {2: 1.0, 4: 2.0}},
        )
        assert search.plan(costs, times, ratio=0.85) == {"3": 2}
        assert search.plan(costs, times, ratio=0.795) == {"2": 4, "3": 2}
        assert search.plan(costs, times, max_cost=0.15) == {"2": 4}
        assert times.step_of({"2": 4, "3": 2}) == pytest.approx(7.9)
        with pytest.raises(
            ValueError,
            match=r"^No plan reaches 0.7 of the full model's step time: .* it is 0.79; raise ratio",
        ):
            search.plan(costs, times, ratio=0.7)

    def test_bad_input_is_one_sentence(self) -> None:
        search = BasisSearch(net())
        good = sensitivities(COSTS)
        for target in ({}, {"ratio": 0.5, "max_cost": 1.0}):
            with pytest.raises(ValueError, match=r"^Give either ratio= or max_cost="):
                search.plan(good, **target)
        with pytest.raises(ValueError, match=r"^ratio is 1.0; it is a share"):
            search.plan(good, ratio=1.0)
        with pytest.raises(ValueError, match=r"^max_cost is nan"):
            search.plan(good, max_cost=math.nan)
        with pytest.raises(ValueError, match=r"^No plan reaches 0.01 of the full model's param"):
            search.plan(good, ratio=0.01)
        with pytest.raises(ValueError, match=r"^The cost of 2 basis filters at layer '2' is NaN"):
            search.plan(sensitivities({"2": {2: math.nan}}), ratio=0.9)
        with pytest.raises(ValueError, match=r"name 'elsewhere', which is not a candidate"):
            search.plan(sensitivities({"elsewhere": {2: 0.1}}), ratio=0.9)
        times = LayerTimes(1.0, {"2": 1.0}, {"2": {2: 0.5}})
        with pytest.raises(ValueError, match=r"^The time of layer '2' with 4 basis filters"):
            search.plan(good, times, ratio=0.9)
        with pytest.raises(ValueError, match=r"gives layer '2' 3 basis filters"):
            good.cost_of({"2": 3})
        assert good.cost_of({"2": 4, "3": 2}) == pytest.approx(1.1)


class TestTimes:
    def test_every_candidate_and_equal_geometries_once(self) -> None:
        model = net().to(memory_format=torch.channels_last).eval()
        state = copy.deepcopy(model.state_dict())
        seen: list[tuple[int, int]] = []
        search = BasisSearch(model)
        x = torch.randn(2, 3, 6, 6).to(memory_format=torch.channels_last)
        times = search.times(x, rounds=2, progress=lambda *at: seen.append(at))
        assert {path: tuple(ranks) for path, ranks in times.basis.items()} == search.candidates
        assert set(times.full) == set(search.candidates)
        everything = [times.step, *times.full.values()]
        everything += [t for layer in times.basis.values() for t in layer.values()]
        assert all(t > 0 for t in everything)
        assert times.basis["2"] == times.basis["3"], "equal layers share one measurement"
        assert times.full["0"] != times.full["2"]
        assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
        assert not model.training
        assert all(p.grad is None for p in model.parameters())
        assert all(torch.equal(state[name], t) for name, t in model.state_dict().items())

    def test_bad_input_is_one_sentence(self) -> None:
        with pytest.raises(ValueError, match=r"^rounds is 0"):
            BasisSearch(net()).times(torch.randn(1, 3, 4, 4), rounds=0)

        class Unused(nn.Sequential):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                out: torch.Tensor = self[0](x)
                return out

        search = BasisSearch(Unused(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)))
        with pytest.raises(ValueError, match=r"^The sample does not reach layer '1'"):
            search.times(torch.randn(1, 3, 8, 8))


PLAN = {"2": 4, "3": 2}


class TestSkipSchedule:
    def forms(self, schedule: SkipSchedule) -> str:
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        forms = ""
        for epoch in range(4):
            x = torch.randn(2, 3, 6, 6)
            before = model(x)
            was_basis = isinstance(model[2], BasisConv2d)
            conversion = schedule.switch(epoch, model, PLAN, optimizer)
            is_basis = isinstance(model[2], BasisConv2d)
            assert is_basis == isinstance(model[3], BasisConv2d) == schedule.basis_in(epoch)
            assert (conversion is None) == (was_basis == is_basis)
            if was_basis or not is_basis:
                torch.testing.assert_close(model(x), before)
            else:
                assert [model[2].basis_channels, model[3].basis_channels] == [4, 2]
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            assert held == {id(p) for p in model.parameters()}
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            forms += "b" if is_basis else "f"
        return forms

    def test_forms_by_epoch(self) -> None:
        assert self.forms(SkipSchedule("basis_first", 2)) == "bbff"
        assert self.forms(SkipSchedule("full_first", 3)) == "fffb"
        assert self.forms(SkipSchedule("none")) == "bbbb"
        assert self.forms(SkipSchedule("full_first", 0)) == "bbbb"
        assert self.forms(SkipSchedule("basis_first", 9)) == "bbbb"

    @pytest.mark.parametrize("order", ["basis_first", "full_first"])
    def test_resuming_gives_the_form_that_the_checkpoint_has(self, order: str) -> None:
        schedule = SkipSchedule(order, 1)
        model = net()
        for epoch in range(3):
            schedule.switch(epoch, model, PLAN)
        resumed = net()
        schedule.switch(2, resumed, PLAN)
        resumed.load_state_dict(model.state_dict())
        assert schedule.switch(2, resumed, PLAN) is None

    def test_bad_input_is_one_sentence(self) -> None:
        with pytest.raises(ValueError, match=r"^Unknown order 'both'; choose one of basis_first"):
            SkipSchedule("both", 1)
        with pytest.raises(ValueError, match=r"^switch_epoch is -1; epochs are counted from 0"):
            SkipSchedule("full_first", -1)
        with pytest.raises(ValueError, match=r"'none' never switches"):
            SkipSchedule("none", 3)
        model = net()
        with pytest.raises(ValueError, match=r"'nowhere', which is not a module"):
            SkipSchedule("none").switch(0, model, {"2": 4, "nowhere": 2})
        assert isinstance(model[2], nn.Conv2d)
