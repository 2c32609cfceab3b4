"""Strategies by name, and what all of them share: names, groups, options, state."""

from __future__ import annotations

import copy
import inspect
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from thinwire.compression.codecs.dct_topk import DctTopK
from thinwire.compression.codecs.dense import Dense
from thinwire.compression.errors import ConfigError
from thinwire.compression.registry import COMPRESSORS, build_compressor
from thinwire.optim.base import Strategy, canonical_name
from thinwire.optim.decoupled import Decoupled
from thinwire.optim.diloco import Diloco
from thinwire.optim.options import ENTRY_OF
from thinwire.optim.registry import STRATEGIES, build_strategy, complete_config, of_new_run, strategy_class
from thinwire.optim.spsa import Spsa

SPSA = {"name": "spsa", "lr": 1e-3}
DECOUPLED = {"name": "decoupled", "lr": 1e-3}


def named(*shapes: tuple[int, ...]) -> list[tuple[str, nn.Parameter]]:
    return [(f"p{i}", nn.Parameter(torch.ones(shape))) for i, shape in enumerate(shapes)]


def test_options_reach_the_strategy() -> None:
    config = {
        **DECOUPLED,
        "compressor": {"name": "dct_topk", "k": 8, "group_size": 1024, "bits": 8},
        "beta": 0.95,
        "sign": False,
    }
    strategy = build_strategy(config, named((2, 2)))
    assert isinstance(strategy, Decoupled)
    assert strategy.compressor == DctTopK(k=8, group_size=1024, bits=8)
    assert (strategy.option("beta"), strategy.option("sign")) == (0.95, False)
    dense = build_strategy({**DECOUPLED, "compressor": {"name": "dense"}}, named((2, 2)))
    assert isinstance(dense, Decoupled)
    assert dense.compressor == Dense()
    spsa = build_strategy({**SPSA, "probes": 5, "eps": 1e-2}, named((2, 2)))
    assert isinstance(spsa, Spsa)
    assert (spsa.option("probes"), spsa.option("eps")) == (5, 1e-2)


def test_complete_config_spells_out_every_default_and_is_stable() -> None:
    complete = complete_config({"name": "decoupled", "compressor": {"name": "dct_topk", "k": 8}})
    assert complete["compressor"] == {
        "name": "dct_topk",
        "k": 8,
        "group_size": 4096,
        "bits": 1,
        "indices": "packed",
        "layout": "flat",
    }
    assert complete["beta"] == 0.999
    assert complete_config(complete) == complete
    assert complete_config({"name": "decoupled"})["compressor"]["name"] == "dct_topk"
    build_strategy(complete, named((2, 2)))


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_row_of_the_table_builds(name: str) -> None:
    strategy = build_strategy({"name": name, "lr": 0.1}, named((3, 3)))
    assert set(strategy.fields())


@pytest.mark.parametrize("name", STRATEGIES)
def test_facts_name_options_and_the_self_test_has_a_case(name: str) -> None:
    facts = strategy_class(name).facts
    options = facts.options.defaults()
    assert {*facts.batches, *facts.small_model, *filter(None, [facts.seconds])} <= options.keys()
    assert {*facts.batches_per_step, *filter(None, [facts.fitted])} <= set(facts.batches)
    assert facts.known_updates
    for case in facts.known_updates.values():
        complete_config({"name": name, **case.options})


@pytest.mark.parametrize("name", STRATEGIES)
def test_groups_hold_the_options(name: str) -> None:
    config = {"name": name, "lr": 0.1, "seed": 7}
    complete = complete_config(config)
    (group,) = build_strategy(config, named((3, 3))).param_groups
    entries = {k: v for k, v in group.items() if k not in ("params", "param_names")}
    assert entries.pop("seed") == 7
    assert entries == {
        ENTRY_OF.get(key, key): repr(build_compressor(value)) if key == "compressor" else value
        for key, value in complete.items()
        if key not in ("name", "seed")
    }


@pytest.mark.parametrize("kind", [Decoupled, Diloco, Spsa])
def test_constructors_show_their_options(kind: type[Strategy]) -> None:
    names = list(inspect.signature(kind).parameters)
    assert names == ["named_parameters", *kind.facts.options.defaults()]
    with pytest.raises(TypeError, match="learning_rate"):
        kind(named((2, 2)), learning_rate=1.0)  # type: ignore[call-arg]


@pytest.mark.parametrize("name", COMPRESSORS)
def test_every_compressor_of_the_table_builds(name: str) -> None:
    build_strategy({**DECOUPLED, "compressor": {"name": name}}, named((3, 3)))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, f"a strategy needs a name: one of {', '.join(sorted(STRATEGIES))}"),
        ({"name": "spas"}, "unknown strategy 'spas': did you mean 'spsa'?"),
        ({"name": "zzz"}, f"unknown strategy 'zzz': one of {', '.join(sorted(STRATEGIES))}"),
        ({"name": "spsa"}, "strategy spsa needs lr"),
        ({**SPSA, "probs": 3}, "strategy spsa has no option 'probs': did you mean 'probes'?"),
        ({**SPSA, "eps": 0}, "eps = 0: must be a number > 0"),
        ({**SPSA, "eps": "small"}, "eps = 'small': must be a number > 0"),
        ({**SPSA, "lr": float("nan")}, "lr = nan: must be a number >= 0"),
        ({**SPSA, "lr": True}, "lr = True: must be a number >= 0"),
        ({**SPSA, "probes": 0}, "probes = 0: must be a whole number from 1 to 4096"),
        ({**SPSA, "probes": 1.5}, "probes = 1.5: must be a whole number from 1 to 4096"),
        ({**SPSA, "max_probes": 8}, "probes = 16: must be a whole number from 1 to 8"),
        ({**SPSA, "max_probes": "8"}, "max_probes = '8': must be a whole number from 1 to "),
        ({**SPSA, "noise": "gaus"}, "noise = 'gaus': did you mean 'gauss'?"),
        ({**SPSA, "noise": ["gauss"]}, "noise = ['gauss']: "),
        ({**SPSA, "seed": -1}, "seed = -1: must be a whole number"),
        ({**DECOUPLED, "beta": 1}, "beta = 1: must be a number >= 0 and < 1"),
        ({**DECOUPLED, "alpha": 2}, "alpha = 2: must be a number >= 0 and <= 1"),
        ({**DECOUPLED, "sign": "yes"}, "sign = 'yes': must be true or false"),
        ({**DECOUPLED, "compressor": "dense"}, "compressor = 'dense': write a table"),
        (
            {**DECOUPLED, "compressor": {"name": "dcttop"}},
            "unknown compressor 'dcttop': did you mean 'dct_topk'?",
        ),
        ({**DECOUPLED, "compressor": {"k": 3}}, "a compressor needs a name"),
        (
            {**DECOUPLED, "compressor": {"name": "dct_topk", "bit": 1}},
            "compressor dct_topk has no option 'bit': did you mean 'bits'?",
        ),
        ({**DECOUPLED, "compressor": {"name": "dct_topk", "bits": 3}}, "compressor dct_topk: bits"),
        ({**DECOUPLED, "compressor": {"name": "dct_topk", "k": "x"}}, "compressor dct_topk: "),
    ],
)
def test_what_is_wrong_is_refused_in_clear_words(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as e:
        build_strategy(config, named((2, 2)))
    assert words in str(e.value)


def test_the_tables_are_cheap() -> None:
    code = (
        "import sys, thinwire.optim.registry; "
        "heavy = {'numba', 'triton', 'hivemind', 'ray', 'torch.distributed.tensor'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# ------------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("layer.0.weight", "layer.0.weight"),
        ("_orig_mod.layer.weight", "layer.weight"),
        ("module._orig_mod.layer.weight", "layer.weight"),
        ("_orig_mod.module.layer._checkpoint_wrapped_module.weight", "layer.weight"),
        ("block.module.weight", "block.module.weight"),
    ],
)
def test_canonical_names(name: str, canonical: str) -> None:
    assert canonical_name(name) == canonical


def test_a_compiled_and_wrapped_model_has_the_same_names() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    names = [p.name for p in Spsa(model.named_parameters(), lr=1.0).parameters_in_order()]
    wrapped = torch.compile(nn.DataParallel(model), backend="eager")
    assert [p.name for p in Spsa(wrapped.named_parameters(), lr=1.0).parameters_in_order()] == names
    assert names == ["0.bias", "0.weight", "1.bias", "1.weight"]


def test_parameters_without_gradient_are_left_out() -> None:
    parameters = named((2, 2), (3,))
    parameters[1][1].requires_grad_(False)
    assert [p.name for p in Spsa(parameters, lr=1.0).parameters_in_order()] == ["p0"]


def test_order_is_by_name_whatever_the_groups() -> None:
    a, b, c = named((1,), (2,), (3,))
    spsa = Spsa([{"params": [c]}, {"params": [a], "lr": 0.5}], lr=1.0)
    spsa.add_param_group({"params": [b], "weight_decay": 0.1})
    found = spsa.parameters_in_order()
    assert [(p.name, p.index) for p in found] == [("p0", 0), ("p1", 1), ("p2", 2)]
    assert [p.group["lr"] for p in found] == [0.5, 1.0, 1.0]
    assert [p.group["weight_decay"] for p in found] == [0.0, 0.1, 0.0]


@pytest.mark.parametrize(
    ("group", "words"),
    [
        ({"params": [nn.Parameter(torch.ones(2))]}, "pass model.named_parameters()"),
        ({"params": named((2,))}, "two parameters are called 'p0'"),
        ({"params": [("x", nn.Parameter(torch.ones(2).double()))]}, "'x' is torch.float64"),
        ({"params": []}, "without a parameter"),
        ({"params": [("x", nn.Parameter(torch.ones(2)))], "lrr": 1.0}, "unknown option 'lrr'"),
        ({"params": [("x", nn.Parameter(torch.ones(2)))], "eps": 1.0}, "eps is one for all"),
        ({"params": [("x", nn.Parameter(torch.ones(2)))], "lr": -1.0}, "lr = -1.0"),
    ],
)
def test_a_group_that_does_not_fit_is_refused(group: dict[str, Any], words: str) -> None:
    spsa = Spsa(named((2,)), lr=1.0)
    with pytest.raises(ConfigError) as e:
        spsa.add_param_group(group)
    assert words in str(e.value)
    assert len(spsa.param_groups) == 1


def test_it_works_on_the_meta_device() -> None:
    """The coordinator knows a run's layout without its weights."""
    with torch.device("meta"):
        model = nn.Linear(100, 50)
    strategy = build_strategy(DECOUPLED, model.named_parameters())
    assert set(strategy.fields()) == {"weight", "bias"}


# ------------------------------------------------------------------------------------------- state


def test_the_state_of_another_model_is_refused() -> None:
    state = Decoupled(named((2, 2)), compressor=Dense()).state_dict()
    other = Decoupled([("q", nn.Parameter(torch.ones(2, 2)))], compressor=Dense())
    with pytest.raises(ConfigError, match="the state of another model"):
        other.load_state_dict(state)


def test_sends_packed_by_another_compressor_are_refused() -> None:
    state = Decoupled(named((2, 2)), compressor=Dense()).state_dict()
    with pytest.raises(ConfigError, match="packed with"):
        Decoupled(named((2, 2)), compressor=DctTopK()).load_state_dict(state)


def test_state_keeps_learning_rates_and_steps() -> None:
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    first = Decoupled([("p", p)], compressor=Dense(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(first, 0.5)
    for _ in range(3):
        first.step(lambda: torch.sum(p * p))
        schedule.step()
    second = Decoupled([("p", q)], compressor=Dense(), lr=9.0)
    second.load_state_dict(first.state_dict())
    assert second.param_groups[0]["lr"] == pytest.approx(0.0125)
    assert second.counters == first.counters == {"steps": 3, "decays": 3}


def test_a_copy_goes_on_like_the_original() -> None:
    model = nn.Linear(3, 2)
    strategy = Decoupled(model.named_parameters(), compressor=DctTopK(k=2), lr=0.1)
    torch.optim.lr_scheduler.ConstantLR(strategy)  # patches `step` of the instance
    strategy.step(lambda: torch.sum(model(torch.ones(1, 3)) ** 2))
    twin_model, twin = copy.deepcopy((model, strategy))
    for m, s in ((model, strategy), (twin_model, twin)):
        s.step(lambda m=m: torch.sum(m(torch.ones(1, 3)) ** 2))
    assert twin.counters == strategy.counters
    assert torch.equal(twin_model.weight, model.weight)


# ------------------------------------------------------------------------------------------- new runs


NEWCOMERS = {"newcomers": 0.1, "newcomers_share": 0.125}


def test_a_new_run_is_bounded_and_says_so() -> None:
    spsa = of_new_run({**SPSA, "probes": 8})
    new = {"bound": 2.0, "own_data_share": 0.25, "own_data_alone": True, **NEWCOMERS}
    assert spsa == {**SPSA, "probes": 8, **new, "clip": 4.0, "max_probes": 8, "lr_scale": "rule"}
    assert of_new_run(SPSA)["max_probes"] == 16
    said = {**SPSA, **dict.fromkeys(new, 0), "clip": 9.0, "max_probes": 64, "lr_scale": "none"}
    assert of_new_run(said) == said
    assert of_new_run({"name": "decoupled"})["bound"] == 2.0
    assert of_new_run({"name": "diloco"})["bound"] == 1.25


def test_a_new_run_has_rice_codes_and_an_older_one_what_its_record_says() -> None:
    short = {"name": "dct_topk", "k": 8}
    for said, name in (
        ({}, "decoupled"),
        ({"compressor": short}, "decoupled"),
        ({"compressor": short}, "diloco"),
    ):
        config = {"name": name, **said}
        recorded = complete_config(of_new_run(config))
        assert recorded["compressor"]["indices"] == "rice"
        assert complete_config(of_new_run(config, recorded)) == recorded
        older = complete_config(config)
        assert older["compressor"]["indices"] == "packed"
        assert complete_config(of_new_run(config, older))["compressor"] == older["compressor"]
    packed = {**short, "indices": "packed"}
    assert of_new_run({"name": "decoupled", "compressor": packed})["compressor"] == packed


def test_a_run_that_is_gone_on_with_has_what_its_record_says() -> None:
    """Also where that is older than an option, or than the value that new runs have."""
    new = ("bound", "own_data_share", "own_data_alone", *NEWCOMERS)
    older = {k: v for k, v in complete_config(SPSA).items() if k not in new}
    assert complete_config(of_new_run(SPSA, older)) == complete_config(SPSA)
    recorded = complete_config(of_new_run({**SPSA, "probes": 8}))
    assert complete_config(of_new_run({**SPSA, "probes": 8}, recorded)) == recorded
    assert of_new_run({**SPSA, "bound": 4.0}, recorded)["bound"] == 4.0
