"""A run whose tokens are bytes: every command accepts it, and reports losses per byte."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import chargpt_jax
from chargpt_jax.config import Config
from chargpt_jax.errors import UserError
from chargpt_jax.main import main
from chargpt_jax.results.facts import facts_in_words
from chargpt_jax.storage.workdir import Workdir
from chargpt_jax.training.setup import Setup

CONTENT = "Prix : 3 € — «naïve» 日本\r\n".encode() + bytes([0, 255])


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bytes")
    (folder / "a.bin").write_bytes(CONTENT * 200)
    config = Config()
    config.data.source, config.data.unit, config.data.test_split = str(folder / "a.bin"), "byte", 0.05
    config.data.batch_size, config.scheduler.max_steps, config.optimizer.learning_rate = 2, 2, 0.01
    config.model.block_size, config.model.n_layer, config.model.n_embd, config.model.n_ff = 16, 1, 16, 16
    config.model.n_head, config.sample.max_new_tokens, config.sample.prompts = 2, 8, ("é",)
    events = list(chargpt_jax.run(config, folder / "run"))
    (end,) = [event for event in events if type(event).__name__ == "Ended"]
    assert end.unit == "byte"
    return folder / "run"


def test_byte_run_has_the_vocabulary_of_all_bytes(run):
    tokens = Workdir(run).load_tokens()
    assert Workdir(run).load_tokenizer().unit == "byte"
    assert tokens.tolist() == [byte + 1 for byte in CONTENT * 200]


def test_byte_run_leaves_the_test_set_out(run):
    n = 200 * len(CONTENT)
    found = chargpt_jax.evaluate(run)
    assert found["tokens"] == n - int(0.8 * n) - int(0.05 * n)
    assert found["bits_per_byte"] == found["bits_per_character"]


@pytest.mark.slow
def test_test_set_is_evaluated_if_asked_for(run, capsys):
    n = int(0.05 * 200 * len(CONTENT))
    found = chargpt_jax.evaluate(run, split="test")
    assert (found["tokens"], found["split"]) == (n, "test")
    content = CONTENT * 200
    assert chargpt_jax.corpus_text(run, "test") == Workdir(run).load_tokenizer().text_of(
        np.array(list(content[-n:])) + 1
    )
    model = chargpt_jax.load(run)
    ids = [byte + 1 for byte in content]
    total, first = 0.0, len(ids) - n
    for start in range(first, len(ids), 16):
        target = np.array(ids[start : start + 16])
        logits = nnx.merge(model.graphdef, model.params)(jnp.array([ids[start - 1 : start - 1 + len(target)]]))[0]
        total -= np.asarray(jax.nn.log_softmax(logits))[np.arange(len(target)), target].sum()
    assert found["loss"] == pytest.approx(total / n, rel=1e-5)
    assert main(["chargpt", "--mode=eval", f"--workdir={run}", "--split=test"]) == 0
    assert f"bits per byte, test set of {n:,} bytes" in capsys.readouterr().out


def test_run_without_a_test_set_says_so(run, monkeypatch, capsys):
    with pytest.raises(UserError, match="split is 'x', but it must be 'validation' or 'test'"):
        chargpt_jax.evaluate(run, split="x")
    monkeypatch.setattr(Setup, "n_test", 0)
    assert main(["chargpt", "--mode=eval", f"--workdir={run}", "--split=test"]) == 2
    assert "has no test set, because data.test_split is 0.05: increase it in a new run." in capsys.readouterr().err


def test_byte_run_reports_losses_per_byte(run):
    facts = chargpt_jax.info(run)
    assert facts["unit"] == "byte"
    assert facts["best_bits_per_byte"] == facts["best_bits_per_character"]
    report, plot = ((run / name).read_text(encoding="utf-8") for name in ("report.html", "loss.svg"))
    assert "nats per byte" in plot
    assert "bits per byte" in plot
    assert "nats per byte" in report
    for text in (report, plot):
        assert not re.search(r"(nats|bits\)?) per character|[\d,]+ characters|rank of the character", text)
    words = str(facts_in_words(facts))
    assert "bits per byte" in words
    assert "character" not in words


@pytest.mark.slow
def test_byte_sample_continues_the_bytes_of_a_prompt(run):
    model, parts = chargpt_jax.load(run), []
    sample = model.generate("é日", 20, on_text=lambda _, text: parts.append(text))[0]
    assert sample.prompt.encode("latin-1") == "é日".encode()
    assert len(sample) == len("é日".encode()) + 20
    assert sample.text == "é日" + "".join(parts) or "\\x" in sample.text
    assert "\ufffd" not in sample.text
    again = type(sample).from_dict(json.loads(json.dumps(sample.to_dict())))
    assert (again.prompt, again.tokens, again.text, again.unit) == (sample.prompt, sample.tokens, sample.text, "byte")
    assert model.branch(sample, 7, "e").tokens[:8] == (*sample.tokens[:7], "e")


def test_byte_score_of_a_file_is_that_of_its_bytes(run, tmp_path, capsys):
    path = tmp_path / "b.bin"
    path.write_bytes(CONTENT)
    assert main(["", "--mode=score", f"--workdir={run}", f"--text_file={path}", "--json"]) == 0
    (saved,) = json.loads(capsys.readouterr().out)["samples"]
    assert "".join(saved["tokens"]).encode("latin-1") == CONTENT
    assert saved["text"] == CONTENT.decode("utf-8", "backslashreplace")
    assert main(["", "--mode=score", f"--workdir={run}", f"--text_file={path}"]) == 0
    assert f"bits per byte, {len(CONTENT)} bytes" in capsys.readouterr().out


def test_byte_stream_prints_the_text_of_the_sample(run, capsys):
    how = ["", "--mode=generate", f"--workdir={run}", "--prompt=é", "--max_new_tokens=40", "--seed=3"]
    printed = []
    for more in ([], ["--stream"]):
        assert main(how + more) == 0
        printed.append(capsys.readouterr().out.partition("\nloss")[0].strip())
    assert printed[0] == printed[1]


def test_byte_model_is_not_exported(run, tmp_path):
    with pytest.raises(UserError, match=r"are bytes, but an exported model has characters: .*data\.unit=character"):
        chargpt_jax.export(run, tmp_path / "x", "hf")


@pytest.mark.parametrize(("field", "value"), [("repair", "all"), ("encoding", "latin-1"), ("start_at", "x")])
def test_byte_unit_refuses_changes_of_the_text(tmp_path, field, value):
    config = Config()
    config.data.unit = "byte"
    setattr(config.data, field, value)
    with pytest.raises(UserError, match=rf"data\.{field} is '{value}', but must be .* if data\.unit is 'byte'"):
        list(chargpt_jax.prepare(config, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
