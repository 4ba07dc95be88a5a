"""How several processes end: with a coordination service in memory, and with real processes on this machine."""

import json
import os
import signal
import threading
import time

import pytest

from benchmarks.processes import CONNECTED, Training, prepared, result
from chargpt_jax.cli import commands
from chargpt_jax.cli import signals as signals_module
from chargpt_jax.cli.signals import Signals
from chargpt_jax.devices import ending
from chargpt_jax.errors import ProcessLost
from chargpt_jax.main import main


class Service:
    """What JAX's client of the coordination service does with keys."""

    def __init__(self) -> None:
        self.values, self.changed = dict[str, str](), threading.Condition()

    def key_value_set(self, key: str, value: str) -> None:
        with self.changed:
            if key in self.values:
                raise RuntimeError("ALREADY_EXISTS")
            self.values[key] = value
            self.changed.notify_all()

    def key_value_try_get(self, key: str) -> str:
        if key not in self.values:
            raise RuntimeError("NOT_FOUND")
        return self.values[key]

    def blocking_key_value_get(self, key: str, milliseconds: int) -> str:
        with self.changed:
            if not self.changed.wait_for(lambda: key in self.values, milliseconds / 1000):
                raise RuntimeError("DEADLINE_EXCEEDED")
            return self.values[key]

    def key_value_dir_get(self, prefix: str) -> list[tuple[str, str]]:
        return [(key, value) for key, value in self.values.items() if key.startswith(prefix)]


@pytest.fixture
def service(monkeypatch):
    service = Service()
    monkeypatch.setattr(ending, "_client", lambda: service)
    return service


@pytest.fixture
def left(monkeypatch):
    """The codes with which the process was to exit; the first one ends the wait for it."""
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    return codes


def test_nothing_is_announced_without_other_processes():
    ending.announce(signal.SIGTERM)
    assert ending.announced() is None


def test_first_announcement_counts_and_reaches_listeners(service, monkeypatch):
    monkeypatch.setattr(ending, "HEARING_SECONDS", 0.01)  # so that requests time out before the announcement
    heard, both = [], threading.Barrier(3)

    def hear(number: int) -> None:
        heard.append(number)
        both.wait(10)

    for _ in range(2):
        ending.listen(hear)
    assert ending.announced() is None
    time.sleep(0.05)
    ending.announce(signal.SIGTERM)
    ending.announce(signal.SIGINT)
    both.wait(10)
    assert heard == [signal.SIGTERM] * 2
    assert ending.announced() == signal.SIGTERM


def test_process_0_leaves_after_the_others(service, left, monkeypatch):
    class State:
        process_id, num_processes = 0, 3

    monkeypatch.setattr(ending, "_state", lambda: State)
    thread = threading.Thread(target=ending.leave_together, args=(143,))
    thread.start()
    for index in (1, 2):
        time.sleep(0.15)
        assert left == []
        service.key_value_set(f"{ending.LEFT}{index}", "")
    said = time.monotonic()
    thread.join(10)
    assert left == [143]
    assert time.monotonic() - said >= ending.EXITING_SECONDS  # the others have this time to exit


def test_other_processes_leave_at_once_and_say_so(service, left, monkeypatch):
    class State:
        process_id, num_processes = 2, 3

    monkeypatch.setattr(ending, "_state", lambda: State)
    ending.leave_together(130)
    assert left == [130]
    assert service.key_value_dir_get(ending.LEFT) == [(f"{ending.LEFT}2", "")]


def test_process_0_does_not_wait_for_a_lost_process(service, left, monkeypatch):
    class State:
        process_id, num_processes = 0, 2

    monkeypatch.setattr(ending, "_state", lambda: State)
    monkeypatch.setattr(ending, "LEAVING_SECONDS", 0.2)
    ending.leave_together(143)
    assert left == [143]


# Signals of one of several processes


def waiting(signals: Signals, seconds: float = 10.0) -> float:
    """Wait for a KeyboardInterrupt; return after which time it came."""
    began = time.monotonic()
    try:
        time.sleep(seconds)
    except KeyboardInterrupt:
        signals.finished = True
    return time.monotonic() - began


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (0, 0)])
def test_announced_signal_stops_a_process_as_its_own(service, number, code):
    with Signals() as signals:
        signals.shared = True
        signals.hear()
        threading.Timer(0.1, ending.announce, [number]).start()
        assert waiting(signals) < 5
        assert signals.code == code
        assert signals.message.startswith("Stopped by " if number else "Time limit reached")


@pytest.mark.parametrize("deferred", [False, True])
def test_signal_is_announced_unless_training_agrees_on_it(service, deferred):
    with Signals() as signals:
        signals.shared, signals.deferred = True, deferred
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)
        except KeyboardInterrupt:
            time.sleep(0.3)
        signals.finished = True
        assert ending.announced() == (None if deferred else signal.SIGTERM)
        assert signals.received() == signal.SIGTERM


def test_process_that_cannot_be_interrupted_is_ended_with_the_sentence(service, left, monkeypatch, capsys):
    monkeypatch.setattr(signals_module, "LEAVING_SECONDS", 0.1)
    monkeypatch.setattr(ending, "leave_together", left.append)
    with Signals() as signals:
        signals.shared = signals.deferred = True  # as a wait in compiled code, in which no signal is handled
        signals.advice = ": run the same command again"
        signals.hear()
        ending.announce(signal.SIGTERM)
        for _ in range(100):
            time.sleep(0.05)
            if left:
                break
        signals.finished = True
    assert left[0] == 143
    assert capsys.readouterr().err == "chargpt: Stopped by SIGTERM: run the same command again.\n"


def test_message_is_written_once_by_whichever_thread_is_first():
    written: list[str] = []
    with Signals() as signals:
        signals.stopped_with(signal.SIGTERM)
        threads = [threading.Thread(target=signals.report, args=(written.append,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        signals.finished = True
    assert written == ["Stopped by SIGTERM."]


def test_loss_of_a_process_that_was_stopped_is_reported_as_its_signal(service, monkeypatch, capsys):
    def lost(request: object) -> int:
        ending.announce(signal.SIGTERM)
        raise ProcessLost("Process 0 of 2 has stopped.")

    monkeypatch.setitem(commands.MODES, "selftest", lost)
    assert main(["chargpt", "--mode=selftest"]) == 143
    assert capsys.readouterr().err == "chargpt: Stopped by SIGTERM.\n"


# Real processes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a config whose run searches a learning rate."""
    folder = tmp_path_factory.mktemp("ending")
    path = prepared(folder, 20)
    config = json.loads(path.read_text())
    config["optimizer"]["learning_rate"] = None
    config["lr_finder"].update(num_zooms=2, steps_per_zoom=20)
    path.write_text(json.dumps(config))
    return folder


def stopped(training: Training, code: int) -> None:
    """Check that both processes end with this code and one sentence."""
    assert training.codes(30.0) == [code, code], training.said(0) + training.said(1)
    name = {130: "SIGINT", 143: "SIGTERM"}[code]
    for index in range(2):
        *_, last = training.said(index).splitlines()
        assert last == f"chargpt: Stopped by {name}: run the same command again; no checkpoint was saved yet."
        assert training.said(index).count("chargpt: ") == 1


@pytest.mark.slow
def test_signal_before_training_stops_all_processes_and_the_run_goes_on(folder):
    config = folder / "config.json"
    moments = [
        (1, signal.SIGTERM, CONNECTED),  # both have the text, and compile the range test
        (0, signal.SIGINT, "zoom 1"),
        (1, signal.SIGINT, "zoom 2"),
        (1, signal.SIGTERM, "parameters"),  # the training steps are compiled
    ]
    for index, number, words in moments:
        training = Training(config, folder / "interrupted", 2)
        assert training.wait_for(words), training.said(0)
        training.send(index, number)
        stopped(training, 130 if number == signal.SIGINT else 143)
    for name in ("interrupted", "whole"):
        training = Training(config, folder / name, 2)
        assert training.codes() == [0, 0], training.said(0)
    assert result(folder / "interrupted") == result(folder / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_signal_while_process_0_reads_the_text_stops_all_processes(folder, index):
    os.mkfifo(folder / f"text-{index}")
    workdir = folder / f"reading-{index}"
    training = Training(folder / "config.json", workdir, 2, [f"--config.data.source={folder / f'text-{index}'}"])
    for _ in range(3000):
        time.sleep(0.02)
        if (workdir / "lock.json").exists():
            break
    time.sleep(1.0)  # for process 0 to open the pipe, and for process 1 to wait for it
    training.send(index, signal.SIGTERM)
    stopped(training, 143)
    assert not (workdir / "config.json").exists()


@pytest.mark.slow
def test_signal_while_samples_are_generated_stops_all_processes(folder):
    words = [f"--config={folder / 'config.json'}", "--config.sample.max_new_tokens=20000"]
    words += ["--config.sample.at_validation=false"]
    training = Training(folder / "config.json", folder / "samples", 2, words, mode="run")
    assert training.wait_for("done: "), training.said(0)
    training.send(1, signal.SIGTERM)
    assert training.codes(30.0) == [143, 143], training.said(0)
