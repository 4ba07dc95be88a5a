"""The number of CPU devices: environment variables, and the devices that `info` and a training report."""

import os
import subprocess
import sys

import pytest

from chargpt_jax.devices import startup
from chargpt_jax.errors import UserError
from chargpt_jax.main import main
from chargpt_jax.training.stages import prepare
from tests.corpus_text import small_config, write_words

FLAG = "--xla_force_host_platform_device_count="
VARIABLES = [("JAX_NUM_CPU_DEVICES", ""), ("XLA_FLAGS", f"--xla_cpu_use_fusion_emitters=false {FLAG}")]


@pytest.mark.parametrize("value", ["0", "abc", "", "-2", "1.5", "5000", "1" * 99])
@pytest.mark.parametrize(("variable", "prefix"), VARIABLES)
def test_an_invalid_number_of_cpu_devices_is_rejected(monkeypatch, capsys, variable, prefix, value):
    monkeypatch.setenv(variable, prefix + value)
    rule = f"but it must be an integer from 1 to 4,096: correct it, or unset {variable}."
    for check in (startup.check_environment, startup.use_every_core):
        with pytest.raises(UserError, match=f"^{variable} sets the number of CPU devices to '{value[:80]}', {rule}"):
            check()
    assert main(["chargpt", "--mode=info", "--workdir=nowhere"]) == 2
    assert capsys.readouterr().err.startswith(f"chargpt: {variable} sets the number of CPU devices")


@pytest.mark.parametrize(("variable", "prefix"), VARIABLES)
def test_a_valid_number_of_cpu_devices_is_accepted(monkeypatch, variable, prefix):
    for value in ("1", "4096", "02"):
        monkeypatch.setenv(variable, prefix + value)
        startup.check_environment()
    monkeypatch.delenv(variable)
    startup.check_environment()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variable", "value"),
    [("JAX_NUM_CPU_DEVICES", "abc"), ("JAX_PLATFORMS", "abc"), ("JAX_ENABLE_X64", "2"), ("JAX_LOG_COMPILES", "maybe")],
)
def test_an_environment_that_jax_refuses_is_answered_in_a_sentence(tmp_path, variable, value):
    config = small_config(write_words(tmp_path / "text.txt"))
    list(prepare(config, tmp_path / "run"))
    command = [sys.executable, "-m", "chargpt_jax.main", "--mode=info", f"--workdir={tmp_path / 'run'}"]
    environment = {**os.environ, "XLA_FLAGS": "", variable: value}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert value in done.stderr


COUNTS = """
import sys
from chargpt_jax import api
from chargpt_jax.events import TrainStarted
print(api.info(sys.argv[1])["devices"])
for event in api.train(api.Workdir(sys.argv[1]).load_config(), sys.argv[1], print):
    if isinstance(event, TrainStarted):
        print(event.device)
found = api.info(sys.argv[1])
print(found["devices"], found["trained_on"], sep=", ")
"""


@pytest.mark.slow
def test_info_and_training_report_the_same_devices(tmp_path):
    """A batch of 12 in two accumulation parts of 6: three of five devices."""
    config = small_config(write_words(tmp_path / "text.txt"))
    config.data.batch_size, config.optimizer.accumulation_steps, config.scheduler.max_steps = 12, 2, 1
    list(prepare(config, tmp_path / "run"))
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "5"}
    command = [sys.executable, "-c", COUNTS, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.stdout.splitlines() == ["3 of 5 x cpu", "3 of 5 x cpu", "3 of 5 x cpu, 3 of 5 x cpu"], done.stderr
