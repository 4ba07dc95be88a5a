"""The number of calls from `main` to a training step, and how often a resumed run opens each file."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.calls import SIZES, chain, measured
from tests.corpus_text import write_words

ROOT = Path(__file__).parents[1]
RESOLVED = {"config.json", "corpus/vocabulary.json", "corpus/tokens.npy"}
"""Files of a workdir that are read when a run is resolved."""

COUNT_OPENS = """
import collections, json, os, sys
opened = collections.Counter()
def hook(event, args):
    if event == "open" and isinstance(args[0], (str, bytes, os.PathLike)):
        opened[os.fsdecode(os.fspath(args[0]))] += 1
sys.addaudithook(hook)
from chargpt_jax.main import main
code = main(["chargpt", *sys.argv[1:]])
print(json.dumps([code, opened]), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def chains(tmp_path_factory):
    return measured(tmp_path_factory.mktemp("calls"))


@pytest.mark.slow
def test_main_to_train_step_takes_at_most_6_calls(chains):
    training, _ = chains
    assert (training[0], training[-1]) == ("main.main", "training.step.train_step")
    assert len(training) - 1 <= 6, training


def test_main_to_sampled_token_takes_at_most_9_calls(chains):
    _, generation = chains
    assert (generation[0], generation[-1]) == ("main.main", "generation.sampler.SamplerState.sample")
    assert len(generation) - 1 <= 9, generation


def test_chain_counts_own_functions_from_main_on():
    assert chain(sys._getframe()) == []


@pytest.mark.slow
def test_resumed_run_opens_each_file_once(tmp_path):
    fields = {f"model.{name}": size for name, size in SIZES.items()} | {
        **{"data.source": write_words(tmp_path / "words.txt"), "data.batch_size": 2, "scheduler.max_steps": 2},
        **{"optimizer.learning_rate": 0.01, "sample.max_new_tokens": 4},
    }
    workdir = tmp_path / "run"
    flags = ["--config=tiny", f"--workdir={workdir}", *(f"--config.{name}={value}" for name, value in fields.items())]
    for line, expected in ((flags, []), (flags, RESOLVED), ([f"--workdir={workdir}"], RESOLVED)):
        command = [sys.executable, "-c", COUNT_OPENS, *line]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
        code, opened = json.loads(done.stderr.splitlines()[-1])
        assert code == 0, done.stderr
        counts = {name: opened.get(str(workdir / name), 0) for name in RESOLVED}
        assert {name for name, count in counts.items() if count == 1} >= set(expected), counts
        assert not expected or all(count <= 1 for count in counts.values()), counts
