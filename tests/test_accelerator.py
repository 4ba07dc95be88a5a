"""benchmarks/accelerator.py: goals, rounds within a time limit, resumption, and a real trial at a tiny size."""

import json
import time
from pathlib import Path

import jax
import pytest

from benchmarks import accelerator, implementations
from benchmarks.accelerator import FREE, GOALS, NANOGPT, NANOGPT_GENERATION, ORIGINAL, OURS, PARTS
from chargpt_jax.devices.platform import BFLOAT16_ON_CPU
from chargpt_jax.model.flops import training_flops

H100 = "NVIDIA H100 80GB HBM3"

RATES = {OURS: 6e6, FREE: 6.6e6, NANOGPT: 2e6, NANOGPT_GENERATION: 1e6, ORIGINAL: 1e6}
"""Tokens/s of a GPU on which every goal is met."""


class Machine:
    """A GPU with given rates, in place of the processes that measure."""

    def __init__(self, monkeypatch, rates=RATES, device=H100, torch=H100, sample_seconds=10.0, digest="a"):
        self.rates, self.device, self.torch, self.digest = rates, device, torch, digest
        self.sample_seconds, self.now, self.tasks, self.stop_at, self.failing = sample_seconds, 0.0, [], None, ""
        monkeypatch.setattr(accelerator, "child", self.child)
        monkeypatch.setattr(accelerator.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(accelerator.os, "sched_getaffinity", lambda _: range(2), raising=False)

    def child(self, task, environment=None, timeout=0.0):
        if task["measure"] == "devices":
            return {"jax": self.device, "torch": self.torch}, 1.0
        if len(self.tasks) == self.stop_at:
            raise KeyboardInterrupt
        self.tasks.append(task)
        if self.failing and self.failing in task["implementation"]:
            raise RuntimeError("out of memory")
        if task["measure"] == "digest":
            return {"digest": self.digest if len(task["dispatches"]) == 1 else "a"}, 1.0
        self.now += self.sample_seconds
        own = {} if self.device == "cpu" else {"device": self.device, "device_mib": 5.0}
        return {"tokens_per_second": self.rates[task["implementation"]], "first_seconds": 1.0, **own}, 9.0

    @property
    def samples(self):
        return [task for task in self.tasks if task["measure"] != "digest"]


def run(tmp_path, *words, folders=True):
    checkouts = ["--nanogpt=a", "--original=b"] if folders else []
    accelerator.main([*checkouts, f"--out={tmp_path / 'out'}", *words])
    return saved(tmp_path)


def saved(tmp_path):
    return json.loads((tmp_path / "out" / "accelerator.json").read_text())


def results(found):
    return [goal["result"] for goal in found["goals"]]


def rounds_of(found):
    return [(row["config"], row["implementation"], row["round"]) for row in found["rows"] if "round" in row]


PER_ROUND = sum(len(part.implementations) for part in PARTS)


def test_goals_are_met_on_a_fast_gpu(monkeypatch, tmp_path, capsys):
    Machine(monkeypatch)
    assert results(run(tmp_path, "--rounds=2")) == ["met"] * len(GOALS)
    assert "| 2.5x | 3x (3x to 3x) | met |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        ({NANOGPT: 2.5e6}, [0]),
        ({ORIGINAL: 1.6e6}, [1]),
        ({OURS: 2e6, NANOGPT: 1e5, ORIGINAL: 1e5, NANOGPT_GENERATION: 1e5}, [2]),
        ({OURS: 7e5, NANOGPT: 1e5, ORIGINAL: 1e5, NANOGPT_GENERATION: 1e5}, [2, 3]),
        ({NANOGPT_GENERATION: 1.4e6}, [4]),
    ],
)
def test_a_goal_is_missed_below_its_least_value(monkeypatch, tmp_path, change, missed):
    Machine(monkeypatch, RATES | change)
    found = results(run(tmp_path, "--rounds=1"))
    assert [i for i, result in enumerate(found) if result == "missed"] == missed
    assert found.count("met") == len(GOALS) - len(missed)


def test_runs_with_different_bits_miss_the_goal(monkeypatch, tmp_path, capsys):
    Machine(monkeypatch, digest="b")
    assert results(run(tmp_path, "--rounds=1")) == ["met"] * (len(GOALS) - 1) + ["missed"]
    assert "trained the same steps: DIFFERENT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("device", "torch", "words"),
    [("cpu", "cpu", ["--size=tiny"]), (H100, H100, ["--size=tiny"]), ("NVIDIA A100-SXM4-40GB", H100, [])],
)
def test_goals_stay_open_on_other_devices_and_sizes(monkeypatch, tmp_path, capsys, device, torch, words):
    Machine(monkeypatch, device=device, torch=torch)
    assert results(run(tmp_path, "--rounds=1", *words)) == ["not measured"] * len(GOALS)
    assert "The goals stay open" in capsys.readouterr().out


def test_price_of_deterministic_kernels_is_reported(monkeypatch, tmp_path, capsys):
    Machine(monkeypatch)
    run(tmp_path, "--rounds=1")
    assert "- 124 M shape: with deterministic kernels, 0.909x the speed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("torch", "folders", "why"),
    [("cpu", True, "PyTorch has no CUDA"), ("absent", True, "PyTorch is not installed"), (H100, False, "no checkout")],
)
def test_a_missing_baseline_is_left_out_and_named(monkeypatch, tmp_path, capsys, torch, folders, why):
    machine = Machine(monkeypatch, torch=torch)
    found = run(tmp_path, "--rounds=1", folders=folders)
    assert results(found) == ["not measured", "not measured", "met", "met", "not measured", "met"]
    assert {task["implementation"] for task in machine.tasks} == {OURS, FREE}
    text = capsys.readouterr().out
    assert all(f"- {name} is left out: {why}" in text for name in ("nanogpt", "original"))


def test_implementations_of_a_part_rotate_from_round_to_round(monkeypatch, tmp_path):
    Machine(monkeypatch)
    found = rounds_of(run(tmp_path, "--rounds=3", "--minutes=1000", "--part=nanogpt_baby"))
    names = [OURS, NANOGPT, FREE]
    assert [name for _, name, _ in found] == names + names[1:] + names[:1] + names[2:] + names[:2]


def test_every_result_is_written_before_the_next_is_measured(monkeypatch, tmp_path):
    machine = Machine(monkeypatch)
    measure = machine.child

    def child(task, *rest):
        path = tmp_path / "out" / "accelerator.json"
        written = rounds_of(json.loads(path.read_text())) if path.exists() else []
        assert len(written) == len(machine.samples)
        return measure(task, *rest)

    monkeypatch.setattr(accelerator, "child", child)
    assert len(rounds_of(run(tmp_path, "--rounds=2", "--minutes=1000"))) == 2 * PER_ROUND


@pytest.mark.parametrize("stop_at", [0, 1, 4, 9, 4 + PER_ROUND, 4 + 2 * PER_ROUND - 1])
def test_a_stopped_command_continues_without_measuring_twice(monkeypatch, tmp_path, stop_at):
    whole = Machine(monkeypatch)
    expected = run(tmp_path / "whole", "--rounds=2", "--minutes=1000")
    first = Machine(monkeypatch)
    first.stop_at = stop_at
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, "--rounds=2", "--minutes=1000")
    assert ended.value.code == 130
    second = Machine(monkeypatch)
    assert run(tmp_path, "--rounds=2", "--minutes=1000") == expected
    assert len(first.samples) + len(second.samples) == len(whole.samples)


def test_the_time_limit_skips_rounds_but_never_cuts_one(monkeypatch, tmp_path):
    """A round takes PER_ROUND x 10 s."""
    minutes = 2.5 * PER_ROUND * 10 / 60
    machine = Machine(monkeypatch)
    found = rounds_of(run(tmp_path, "--rounds=5", f"--minutes={minutes}"))
    assert {index for _, _, index in found} == {0, 1}
    assert len(found) == 2 * PER_ROUND
    assert machine.now <= 60 * minutes


def test_the_first_round_of_a_command_ignores_the_time_limit(monkeypatch, tmp_path):
    Machine(monkeypatch)
    assert len(rounds_of(run(tmp_path, "--rounds=5", "--minutes=0.1"))) == PER_ROUND
    Machine(monkeypatch)
    assert len(rounds_of(run(tmp_path, "--rounds=5", "--minutes=0.1"))) == 2 * PER_ROUND


def test_a_failed_sample_is_reported_and_measured_by_the_next_command(monkeypatch, tmp_path, capsys):
    machine = Machine(monkeypatch)
    machine.failing = "original"
    found = run(tmp_path, "--rounds=2", "--minutes=1000")
    assert results(found)[1] == "not measured"
    assert len([task for task in machine.samples if task["implementation"] == ORIGINAL]) == 1
    assert "- original, bfloat16, small, training: out of memory" in capsys.readouterr().out
    Machine(monkeypatch)
    found = run(tmp_path, "--rounds=2", "--minutes=1000")
    assert results(found)[1] == "met"
    assert not any("error" in row for row in found["rows"])


@pytest.mark.parametrize("change", [{"device": "NVIDIA H200"}, {"torch": "cpu"}])
def test_results_of_another_machine_are_refused(monkeypatch, tmp_path, capsys, change):
    Machine(monkeypatch)
    before = run(tmp_path, "--rounds=1")
    Machine(monkeypatch, **change)
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, "--rounds=1")
    assert ended.value.code == 2
    assert "choose another --out" in capsys.readouterr().err
    assert saved(tmp_path) == before


def test_full_size_is_refused_without_an_accelerator(monkeypatch, tmp_path, capsys):
    machine = Machine(monkeypatch, device="cpu")
    with pytest.raises(SystemExit) as ended:
        run(tmp_path)
    assert ended.value.code == 2
    assert "use --size=tiny" in capsys.readouterr().err
    assert not machine.tasks
    assert not (tmp_path / "out").exists()


def test_mfu_is_rate_times_flops_per_token_over_peak():
    row = {"config": "124 M shape", "implementation": OURS, "size": "full", "device": H100, "tokens_per_second": 5e5}
    config = implementations.config_of(accelerator.task_of(PARTS[3], OURS, "full", {}, 1.0))
    per_token = training_flops(config.model, config.data.batch_size) / (16 * 1024)
    assert accelerator.mfu(row) == pytest.approx(5e5 * per_token / 989e12)
    assert accelerator.mfu({**row, "device": "unheard of"}) is None


def test_the_124_m_shape_has_the_layers_of_gpt_2():
    model = implementations.config_of(accelerator.task_of(PARTS[3], OURS, "full", {}, 1.0)).model
    layer = 4 * 768 * 768 + 2 * 768 * 3072
    assert training_flops(model, 1) == pytest.approx((6 * 12 * layer + 12 * 12 * 768 * 1024) * 1024, rel=0.01)
    assert (model.n_layer, model.n_head, model.n_head_dim, model.block_size) == (12, 12, 64, 1024)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
@pytest.mark.parametrize("size", ["full", "tiny"])
def test_generation_and_sizes_of_every_part_are_valid(part, size):
    task = accelerator.task_of(part, part.implementations[0], size, {}, 1.0)
    model = implementations.config_of(task).model
    assert model.n_embd == model.n_head * model.n_head_dim or part.config == "small"
    if task["measure"] == "generation":
        assert task["prompt"] + task["count"] == model.block_size
    if "without dropout" in part.name:
        assert model.dropout == 0.0


def test_benchmarks_page_has_the_table_of_goals():
    """It has no results, because no H100 or H200 was available."""
    page = (Path(__file__).parents[1] / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert "\n".join(accelerator.goals_table([], {})) in page


def test_only_the_first_gpu_is_used(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert accelerator.one_device() == {"CUDA_VISIBLE_DEVICES": "3"}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert accelerator.one_device() == {"CUDA_VISIBLE_DEVICES": "0"}


def test_many_cores_compile_all_but_the_nondeterministic_programs_first(monkeypatch, tmp_path):
    machine = Machine(monkeypatch)
    monkeypatch.setattr(accelerator.os, "sched_getaffinity", lambda _: range(16), raising=False)
    run(tmp_path, "--rounds=1", "--part=124 M shape")
    assert [task["measure"] for task in machine.tasks] == ["start"] * 2 + ["training"] * 3
    assert FREE not in [task["implementation"] for task in machine.tasks[:2]]


@pytest.mark.slow
@pytest.mark.skipif(jax.__version_info__ < BFLOAT16_ON_CPU, reason="this JAX cannot multiply bfloat16 on a CPU")
def test_a_trial_on_this_machine_measures_and_checks_the_bits(tmp_path, capsys):
    began = time.monotonic()
    words = ["--size=tiny", "--rounds=1", "--seconds=0.1", "--part=small"]
    found = run(tmp_path, *words, folders=False)
    (identity, row) = found["rows"]
    assert identity["digests"][0] == identity["digests"][1]
    assert len(identity["digests"][0]) == 64
    assert row["tokens_per_second"] > 0
    assert row["seconds"] < time.monotonic() - began
    assert "bit-identical" in capsys.readouterr().out


def test_nondeterministic_kernels_are_an_option_of_the_gpu_alone(monkeypatch):
    from chargpt_jax.devices import platform

    monkeypatch.setattr(platform, "ON_GPU", dict(platform.ON_GPU))
    assert platform.ON_GPU["xla_gpu_deterministic_ops"]
    config = implementations.config_for("tiny")
    implementations.ChargptJax(config, implementations.IMPLEMENTATIONS[FREE][1], None)
    assert not platform.ON_GPU["xla_gpu_deterministic_ops"]
    assert config.amp.dtype == "bfloat16"
