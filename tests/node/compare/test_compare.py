"""`thinwire compare`: real strategies on a tiny model, their figures against those of links and of torch."""

from __future__ import annotations

import json
import math
import signal
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from thinwire.compression.base import Part, Step, Target, Turn
from thinwire.compression.errors import ConfigError
from thinwire.compression.registry import build_compressor
from thinwire.coordinator.protocol.schedule import lr_factor
from thinwire.coordinator.protocol.settings import ScheduleSection
from thinwire.node.compare.comparison import Comparison, Outcome
from thinwire.node.compare.specs import ComparePlan, fitted, notable, plans
from thinwire.node.compare.split import Split
from thinwire.node.compare.view import compare_command
from thinwire.node.config import RunConfig, load_config
from thinwire.node.genesis import initialise, make_genesis
from thinwire.node.phases import Stopwatch, time_calls, time_compressor, typical
from thinwire.node.replica import data_seed
from thinwire.node.tasks.registry import make_task
from thinwire.optim.registry import STRATEGIES, build_strategy, strategy_class

RUN = """
[run]
name = "tiny"
rounds = 12
min_peers = 2
eval_every = 3

[task]
layers = 1
width = 16
heads = 2
context = 16
batch = 4
held_out_bytes = 2048

[strategy]
name = "decoupled"
lr = 1e-2
beta = 0.9
compressor = { name = "dct_topk", k = 8, group_size = 1024, bits = 1 }

[schedule]
name = "linear"
warmup_rounds = 4
final_factor = 0.5
"""
SPECS = "ddp, decoupled, decoupled:random_k(rate=0.1), diloco(inner_steps=3), spsa(probes=4, lr=1e-3)"
N_PEERS = 3

Start = Callable[..., Any]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return load_config(written(tmp_path_factory.mktemp("run")), environ={})


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    return written(tmp_path)


def written(folder: Path) -> Path:
    path = folder / "run.toml"
    path.write_text(RUN)
    return path


def trained(run: RunConfig, specs: str, **options: Any) -> dict[str, Outcome]:
    comparison = Comparison(run, plans(specs, run), N_PEERS, **options)
    return {o.plan.label: o for o in comparison.train(lambda _plan, _round, _held_out: None, lambda: False)}


@pytest.fixture(scope="module")
def outcomes(run: RunConfig) -> dict[str, Outcome]:
    return trained(run, SPECS)


def command(run_file: Path, specs: str, **options: Any) -> int:
    defaults: dict[str, Any] = {
        **{"rounds": 4, "peers": None, "overrides": {}, "import_path": None, "output": None},
        **{"as_json": True, "stopped": lambda: False},
    }
    return compare_command(run_file, specs, **{**defaults, **options})


# ------------------------------------------------------------------------------------------ what is trained


def test_all_have_the_same_tokens_of_the_same_data(run: RunConfig, outcomes: dict[str, Outcome]) -> None:
    assert [o.plan.rounds for o in outcomes.values()] == [12, 12, 12, 4, 3]
    for outcome in outcomes.values():
        assert outcome.error is None
        assert outcome.last.tokens == 12 * 4 * 16
        assert outcome.last.steps == 12
        assert outcome.curve[0].held_out == outcomes["decoupled"].curve[0].held_out
        assert outcome.curve[0].round == outcome.curve[0].payload_bytes == 0
        assert len(outcome.fingerprints) == N_PEERS + 1
        assert len(set(outcome.fingerprints)) == 1
    ends = {o.fingerprints[0] for o in outcomes.values()}
    assert len(ends) == len(outcomes)
    for label, again in trained(run, "decoupled, spsa(probes=4, lr=1e-3)").items():
        assert again.curve == outcomes[label].curve
        assert again.fingerprints == outcomes[label].fingerprints


def test_bytes_are_those_that_links_have_sent(run: RunConfig, outcomes: dict[str, Outcome]) -> None:
    n_params = Comparison(run, plans("ddp", run), N_PEERS).n_params
    per_round = {label: o.payload_bytes_per_peer_round for label, o in outcomes.items()}
    for outcome in outcomes.values():
        assert outcome.sent_bytes == pytest.approx(outcome.last.payload_bytes * N_PEERS, abs=1e-6)
        all_reduced = 2 * (N_PEERS - 1) / N_PEERS * 4 * n_params * 12
        assert outcome.ddp_ratio == pytest.approx(all_reduced / outcome.last.payload_bytes)
    assert per_round["ddp"] == 4 * n_params + 29
    assert per_round["spsa(probes=4, lr=1e-3)"] <= 4 + 34
    assert per_round["decoupled"] < per_round["decoupled:random_k(rate=0.1)"] < per_round["ddp"] / 8
    assert outcomes["diloco(inner_steps=3)"].ddp_ratio > 3 * 8  # 4 bits of 32, every third step


def test_peers_of_uneven_data_train_on_their_own(run: RunConfig, outcomes: dict[str, Outcome]) -> None:
    comparison = Comparison(run, plans("decoupled", run), N_PEERS, split=Split("labels", 2))
    own = [data[0] for data in comparison.own_data if data is not None]
    assert len(set(own)) == N_PEERS
    assert comparison.split_told is not None
    assert "6 classes" in comparison.split_told
    (outcome,) = comparison.train(lambda _plan, _round, _held_out: None, lambda: False)
    assert len(set(outcome.fingerprints)) == 1
    assert outcome.last.tokens == outcomes["decoupled"].last.tokens
    assert outcome.last.held_out != outcomes["decoupled"].last.held_out


def test_gossip_counts_what_goes_to_neighbours_and_does_the_same_again(run: RunConfig) -> None:
    """Rounds 2 and 4 merge; in round 1 nobody was counted yet, so that round 3 has the only exchange: three
    peers, a pair of which meets."""
    spec = "gossip(inner_steps=3, merge_every=2)"
    (outcome,) = trained(run, spec).values()
    assert outcome.error is None
    assert len(set(outcome.fingerprints)) == 1
    assert outcome.last.held_out < outcome.curve[0].held_out
    in_bytes = [p.payload_bytes * N_PEERS for p in outcome.curve]
    model = in_bytes[2] - in_bytes[1]
    merged = Comparison(run, plans("ddp", run), N_PEERS).n_params
    assert in_bytes[1] < 200
    assert model == pytest.approx(N_PEERS * merged, rel=0.1)
    assert in_bytes[3] - in_bytes[2] == pytest.approx(2 * merged, rel=0.1)
    assert outcome.sent_bytes == pytest.approx(outcome.last.payload_bytes * N_PEERS)
    (again,) = trained(run, spec).values()
    assert again.curve == outcome.curve
    assert again.fingerprints == outcome.fingerprints


def test_time_is_spent_where_a_strategy_works(outcomes: dict[str, Outcome]) -> None:
    assert all(o.phases["compute"] > 0 and o.phases["decode"] > 0 for o in outcomes.values())
    assert all(o.phases["pack"] > 0 for o in outcomes.values())


def test_ddp_is_data_parallel_adamw(run: RunConfig, outcomes: dict[str, Outcome]) -> None:
    """torch's own AdamW on the mean gradient of the same batches."""
    task = make_task(run.task, None, None)
    task.load(None, task.held_out())
    model = task.model()
    initialise(model, make_genesis(run, task, "x", 1).body, run.run.seed, None)
    schedule = ScheduleSection(**run.schedule.model_dump())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    seed = run.run.seed.to_bytes(32, "little")
    for n in range(1, 13):
        optimizer.zero_grad()
        for peer in range(N_PEERS):
            (task.draw(model, data_seed(seed, 0, f"peer-{peer}", n))() / N_PEERS).backward()
        optimizer.param_groups[0]["lr"] = 3e-3 * lr_factor(schedule, n, 12)
        optimizer.step()
    model.eval()
    with torch.no_grad():
        held_out = task.evaluate(model)
    assert outcomes["ddp"].last.held_out == pytest.approx(held_out, abs=1e-4)
    assert held_out < outcomes["ddp"].curve[0].held_out - 0.2


def test_throwing_payloads_away_changes_nothing(run: RunConfig, outcomes: dict[str, Outcome]) -> None:
    pruned = trained(run, "ddp", kept_bytes=1)["ddp"]  # a snapshot after every round
    assert pruned.error is None
    assert pruned.fingerprints == outcomes["ddp"].fingerprints
    assert pruned.last == outcomes["ddp"].last


def test_a_strategy_that_diverges_does_not_take_the_others_along(
    run_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run_file.parent)
    specs = "decoupled(lr=100, weight_decay=1e30), spsa"
    assert command(run_file, specs, output=Path("x.png")) == 1
    result = json.loads(capsys.readouterr().out)
    diverged, spsa = result["strategies"][2:]
    assert diverged["strategy"] not in result["recommendation"]
    assert "non-finite" in diverged["error"]
    assert spsa["error"] is None
    assert spsa["held_out_last"] < 6


def test_a_task_of_ones_own_from_base_weights(
    run_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (run_file.parent / "compared_task.py").write_text(
        "from thinwire.node.tasks.text import TextTask\n"
        "def make(options, data):\n"
        "    return TextTask(options.model_copy(update={'width': 24}), data)\n"
    )
    monkeypatch.chdir(run_file.parent)
    config = load_config(run_file, {"task.width": 24}, environ={})
    base = {
        name: torch.linspace(-0.2, 0.3, p.numel()).view_as(p) * (not name.startswith("head"))
        for name, p in make_task(config.task, None, None).model().named_parameters()
    }
    save_file(base, run_file.parent / "base.safetensors")
    options = {"import_path": "compared_task:make", "overrides": {"run.base": "base.safetensors"}}
    assert command(run_file, "decoupled:dense,spsa", **options) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["n_params"] == sum(p.numel() for p in base.values())
    for s in result["strategies"]:
        assert s["held_out_first"] == pytest.approx(math.log(256))  # the last layer is zero
        assert s["held_out_last"] != s["held_out_first"]


# ------------------------------------------------------------------------------------------ what is shown


def test_json_and_picture(run_file: Path, capsys: pytest.CaptureFixture[str], own_temp_folder: Path) -> None:
    image = pytest.importorskip("matplotlib.image", reason="the picture is an extra")
    picture = run_file.with_name("x.png")
    assert command(run_file, "decoupled,diloco,spsa", output=picture) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert f"Wrote {picture}" in captured.err.replace("\n", "")
    assert (result["run"], result["peers"], result["unit"], result["stopped"]) == (
        "tiny",
        2,
        "nats/byte",
        False,
    )
    assert result["png"] == str(picture)
    assert [s["strategy"] for s in result["strategies"]] == ["alone", "ddp", "decoupled", "diloco", "spsa"]
    assert result["strategies"][:2] == [result["alone"], result["ddp"]]
    assert result["alone"]["payload_bytes_per_peer_step"] == 0
    assert result["alone"]["held_out_at_equal_bytes"] is None
    assert result["recommendation"].startswith(("Take ", "Train alone: "))
    assert "Fewer than 20 rounds" in result["warnings"][0]
    for s in result["strategies"][1:]:
        assert s["tokens_per_peer"] == 16 * result["samples_per_step"] * s["steps"] == 4 * 64
        assert s["ddp_ratio"] == pytest.approx(
            result["ddp_bytes_per_peer_step"] / s["payload_bytes_per_peer_step"]
        )
        assert s["payload_bytes_per_peer_round"] * s["rounds"] == pytest.approx(s["curve"][-1][3])
        assert s["held_out_last"] == s["curve"][-1][4]
        assert set(s["phase_s_per_peer_round"]) == {"compute", "pack", "decode"}
        assert s["options"]["name"] == s["strategy"].replace("ddp", "decoupled")
        assert s["held_out_seeds"] == [s["held_out_last"]]
        assert s["estimated_s_per_round"] > result["alone"]["estimated_s_per_round"]
        assert s["fingerprint"]
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = image.imread(picture)
    assert pixels.shape[0] > 400
    assert pixels.shape[1] > 1000
    assert pixels[..., :3].std() > 0.02  # something is drawn
    assert sorted(p.name for p in run_file.parent.iterdir() if p != own_temp_folder) == ["run.toml", "x.png"]


def test_without_matplotlib_there_is_a_table_and_a_word_about_it(
    run_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run_file.parent)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert command(run_file, "decoupled,spsa", as_json=False) == 0
    captured = capsys.readouterr()
    assert "pip install 'thinwire[plot]'" in captured.err
    assert "held-out" in captured.out
    rows = {line.split()[0]: line.split() for line in captured.out.splitlines()}
    assert rows["decoupled"][1:3] == ["4", "256"]
    assert rows["spsa:"][1] == "lr=0.002,"
    assert not list(run_file.parent.glob("*.png"))


@pytest.mark.parametrize(
    ("specs", "options", "message"),
    [
        ("spsb", {}, "unknown strategy 'spsb': did you mean 'spsa'?"),
        ("decoupled:topl", {}, "unknown compressor 'topl': did you mean 'topk'?"),
        ("decoupled(bta=0.5)", {}, "no option 'bta': did you mean 'beta'?"),
        ("decoupled(beta=2)", {}, r"decoupled\(beta=2\): beta = 2: must be a number"),
        ("decoupled:dct_topk(k=8", {}, "stays open"),
        ("spsa,spsa", {}, "spsa is named twice"),
        ("spsa:dense", {}, "no option 'compressor'"),
        ("decoupled:none", {}, "nothing"),
        ("decoupled(0.5)", {}, "write it as option=value"),
        ("ddp:topk", {}, "ddp is AdamW, ddp on whole gradients"),
        ("alone(k=3)", {}, "alone is AdamW"),
        ("spsa", {"link": "10"}, "--link 10: write it as"),
        ("diloco(max_seconds=3.0)", {}, "max_seconds leaves it to the clock"),
        ("diloco(inner_steps=0)", {}, "whole numbers from 1 on"),
        (" ,", {}, "name some"),
        ("missing.toml", {}, "missing.toml: cannot be read"),
        ("spsa", {"peers": 1}, "--peers: between 2 and 32"),
        ("spsa", {"output": Path("x.pdf")}, "name it x.png"),
        ("spsa", {"output": Path("nowhere/x.png")}, "nowhere is not there"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_trained(
    run_file: Path, own_temp_folder: Path, specs: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        command(run_file, specs, **options)


@pytest.mark.swarm
def test_ctrl_c_shows_what_is_there(
    thinwire: Start, run_file: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path_factory.mktemp("temporary")
    monkeypatch.setenv("TMPDIR", str(temporary))
    program = thinwire(
        "compare",
        "run.toml",
        "--strategies",
        "decoupled,decoupled:topk",
        "--rounds",
        "20",
        "--json",
        "--set",
        "task.width=32",
        "-o",
        "x.png",
    )
    program.wait_for("decoupled:topk: round", 100)
    program.process.send_signal(signal.SIGINT)
    assert program.wait() == 128 + signal.SIGINT, program.stderr()
    result = json.loads(program.stdout())
    assert result["stopped"] is True
    assert [s["strategy"] for s in result["strategies"]] == ["alone", "ddp", "decoupled"]
    assert "1 of 4 strategies are left out" in program.stderr()
    assert not list(temporary.glob("thinwire-*"))  # torch may leave a cache of its own
    assert "Traceback" not in program.stderr()


@pytest.mark.swarm
def test_the_command(thinwire: Start, run_file: Path) -> None:
    program = thinwire("compare", "run.toml", "--strategies", "decoupled", "--rounds", "2", "--peers", "2")
    assert program.wait() == 0, program.stderr()
    rows = [line.split()[:3] for line in program.stdout().splitlines()[1:4]]
    assert rows == [["alone", "2", "128"], ["ddp", "2", "128"], ["decoupled", "2", "128"]]


# ------------------------------------------------------------------------------------------ specs and phases


def plan_of(spec: str, run: RunConfig) -> ComparePlan:
    (plan,) = plans(spec, run)
    return plan


def test_the_run_files_options_belong_to_the_strategy_that_it_names(run: RunConfig, tmp_path: Path) -> None:
    own = plan_of("decoupled", run)
    assert (own.rounds, own.n_batches, own.options["lr"], own.options["beta"]) == (12, 1, 1e-2, 0.9)
    other = plan_of("decoupled:topk(k=4, bits=2)", run).options
    assert (other["lr"], other["compressor"]["name"]) == (1e-2, "topk")
    assert (other["compressor"]["k"], other["compressor"]["bits"]) == (4, 2)
    same = plan_of("decoupled(beta=0.5):dct_topk(bits=8)", run).options
    assert same["beta"] == 0.5
    assert same["compressor"] == {**own.options["compressor"], "bits": 8}
    assert plan_of("diloco", run).options["outer_lr"] == 0.7
    table = plan_of('diloco(inner={name="SGD", momentum=0.9}, weight_decay=0.0)', run).options
    assert table["inner"] == {"name": "SGD", "momentum": 0.9}
    path = tmp_path / "more.toml"
    path.write_text(
        '[spsa]\nlr = 1e-4\n[eight]\nname = "decoupled"\ncompressor = {name = "dense", bits = 8}\n'
    )
    spsa, eight, _ = plans(f"{path}, ddp", run)
    assert (spsa.label, spsa.options["lr"]) == ("spsa", 1e-4)
    assert (eight.label, eight.options["compressor"]["bits"]) == ("eight", 8)
    assert notable(eight.options) == "lr=0.003, compressor=dense(bits=8)"


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_of_the_registry_has_a_plan(name: str, run: RunConfig) -> None:
    plan = plan_of(name, run)
    facts = strategy_class(name).facts
    assert plan.options["name"] == name
    assert plan.n_batches == math.prod(plan.options[option] for option in facts.batches)
    small = {} if name == run.strategy["name"] else facts.small_model
    assert {option: plan.options[option] for option in small} == small
    assert notable(plan.options).startswith("lr=")


def test_rounds_of_others_are_fitted_to_the_tokens(run: RunConfig) -> None:
    long = load_config(None, {"run.rounds": 200}, environ={})
    own, said = plan_of("diloco", long), plan_of("diloco(inner_steps=30)", long)
    assert (own.n_batches, own.rounds) == (25, 8)
    assert (said.n_batches, said.rounds) == (30, 7)
    assert fitted(50, 30) == 10
    assert fitted(3, 30) == 1
    for n_total in range(5, 400):
        n = fitted(n_total, 16)
        assert 1 <= n <= 16
        assert n_total // n >= 5
        assert abs(round(n_total / n) * n - n_total) <= max(1, 0.06 * n_total)


def test_own_time_of_nested_phases() -> None:
    clock = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0])
    watch = Stopwatch(clock=lambda: next(clock))
    with watch.phase("compute"):
        with watch.phase("pack"):
            pass
        watch.next_round()
    with watch.phase("compute"):
        pass
    assert [dict(r) for r in watch.rounds] == [{"compute": 1.0, "pack": 2.0}, {"compute": 8.0}]
    assert typical([watch], "compute") == 4.5


def test_a_timed_object_is_what_it_was() -> None:
    watch = Stopwatch()
    plain, other = (build_compressor({"name": "dct_topk", "k": 4}) for _ in range(2))
    before = repr(plain)
    time_calls(plain, {"fields": "asking"}, watch)
    part = Part.whole((10,))
    assert plain.fields(part) == other.fields(part)
    assert repr(plain) == before
    assert isinstance(plain, type(other))
    assert set(watch.rounds[0]) == {"asking"}
    assert type(other) is not type(plain)


def test_decoding_is_timed_in_each_of_its_forms() -> None:
    seconds = count()
    watch = Stopwatch(clock=lambda: float(next(seconds)))
    strategy = build_strategy({"name": "decoupled"}, [("w", nn.Parameter(torch.zeros(64)))])
    time_compressor(strategy, watch)
    target, part, turn = torch.zeros(64), Part.whole((64,)), Turn(1, 1, 1, 1.0)
    packed = strategy.compressor.pack(torch.ones(64), part, turn)  # type: ignore[attr-defined]
    assert set(watch.rounds[0]) == {"pack"}
    targets = [Target(target, part, "w", Step())]
    strategy.compressor.fused_update(targets, [{"w": packed}], [1.0], turn)  # type: ignore[attr-defined]
    assert watch.rounds[0]["decode"] > 0
    assert bool(target.any())
