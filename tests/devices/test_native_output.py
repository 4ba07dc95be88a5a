import subprocess
import sys
from pathlib import Path

import pytest

from chargpt_jax.devices.native_output import LOST, NOT_FOUND, TWICE, filtered

ROOT = Path(__file__).parents[2]

BEFORE = [
    "E1129 19:42:25.595051   29825 coordination_service_agent.cc:289] Polled an error from coordination service.\n",
    "[Gloo] Rank [Gloo] Rank 0 is connected to 20 peer ranks.  is connected to Expected number of connected\n",
]
FATAL = (
    "F1129 19:42:25.595075   29825 client.h:80] Terminating process because the JAX distributed service detected fatal "
    "errors. This most likely indicates that another task died; see the other task logs for more details.\n"
)
TRACE = ["*** Check failure stack trace: ***\n", "    @     0x7f4773d40634  absl::lts_20260107::log_internal\n"]


def test_filtered_gives_one_sentence_for_a_lost_process():
    after = ["RPC: /xla.coordination.CoordinationService/PollForError [type.googleapis.com/tensorflow]\n"]
    assert list(filtered(["one\n", *BEFORE, FATAL, *after, *TRACE])) == ["one\n", LOST]


@pytest.mark.parametrize("service", ["xla.coordination", "tensorflow"])
def test_filtered_gives_one_sentence_for_a_failed_connection(service):
    after = ["\n", f"RPC: /{service}.CoordinationService/RegisterTask\n"]
    assert list(filtered([FATAL, *after, *TRACE])) == [NOT_FOUND]


def test_filtered_names_an_index_that_was_started_twice():
    reason = "absl::Status: ABORTED: 1 unexpectedly tried to connect with a different incarnation.\n"
    after = ["\n", "RPC: /xla.coordination.CoordinationService/PollForError\n"]
    assert list(filtered([*BEFORE, f"{FATAL.rstrip()} {reason}", *after, *TRACE])) == [TWICE]


def test_filtered_drops_messages_of_several_lines_before_the_fatal_one():
    before = ["E1129 19:42:41.299292 30045 coordination_service.cc:1549] The following tasks are unhealthy:\n", "1\n"]
    assert list(filtered([*before, "The tasks have crashed.\n", FATAL, *TRACE])) == [LOST]
    other = "W1129 19:42:41.299292 30045 cpu.cc:9] The CPU is slow.\n"
    assert list(filtered([*before, other, "one\n"])) == [other, "one\n"]
    assert list(filtered([*before, "chargpt: The disk is full.\n"])) == ["chargpt: The disk is full.\n"]


def test_filtered_gives_no_second_sentence_after_an_error():
    assert list(filtered(["chargpt: The disk is full.\n", *BEFORE, FATAL, *TRACE])) == ["chargpt: The disk is full.\n"]


def test_filtered_passes_other_lines_on():
    lines = ["W1129 19:42:25.595051 29825 cpu.cc:9] The CPU is slow.\n", *TRACE, "no end of line"]
    assert list(filtered(lines)) == lines


def diverted(code: str) -> "subprocess.CompletedProcess[str]":
    """Run code after `divert` in a process of its own."""
    code = f"import os, sys\nfrom chargpt_jax.devices import native_output\nnative_output.divert()\n{code}"
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


def test_divert_separates_libraries_from_python():
    code = 'print("own")\nos.write(1, b"[Gloo] Rank 0\\nnative\\n")\nprint("error", file=sys.stderr)\nsys.exit(7)'
    done = diverted(code)
    assert (done.returncode, done.stdout) == (7, "own\n")
    assert done.stderr.splitlines() == ["native", "error"]


def test_divert_reports_a_process_that_aborts():
    done = diverted(f"os.write(2, {FATAL!r}.encode())\nos.abort()")
    assert done.returncode != 0
    assert (done.stdout, done.stderr) == ("", LOST)
