"""Train on a rented GPU at Modal, and see the progress on this machine.

    pip install -e ".[modal]" && modal setup
    modal run examples/modal_app.py --config=small
    modal run examples/modal_app.py --config=tiny --source=my_text.txt --name=mine
    modal volume get chargpt-runs mine runs/

The remote function yields the run's typed events, which the progress bar or the notebook here displays. The run is on a
volume, so the same command resumes it after an interruption or the time limit. The last command copies it to this
machine.
"""

from collections.abc import Iterator
from pathlib import Path

import modal

import chargpt_jax
from chargpt_jax import events
from chargpt_jax.config import Config

GPU = "H100"
HOURS = 4
"""Time limit of the remote function; a checkpoint is saved before it."""

RUNS = "/runs"

app = modal.App("chargpt_jax")
volume = modal.Volume.from_name("chargpt-runs", create_if_missing=True)
image = (
    modal.Image.debian_slim(python_version="3.12")
    .uv_pip_install("jax[cuda12]", "flax", "optax", "orbax-checkpoint", "tensorstore", "ftfy", "requests")
    .uv_pip_install("charset-normalizer", "ml-collections", "absl-py", "rich", "psutil")
    .add_local_python_source("chargpt_jax", ignore=["**/__pycache__"])  # with the scripts of the report
)


@app.function(gpu=GPU, image=image, volumes={RUNS: volume}, timeout=HOURS * 3600)
def train(config: Config, name: str, text: bytes | None = None, runs: str = RUNS) -> Iterator[events.Event]:
    """Train on the remote machine; yield the events.

    Args:
        config: of the run.
        name: of the run's folder on the volume.
        text: the content of a local text file; None: `data.source` names a text that can be downloaded.
        runs: the folder of all runs.
    """
    if text is not None:
        source = Path(runs) / f"{name}.txt"
        source.write_bytes(text)
        config.data.source = str(source)
    for event in chargpt_jax.run(config, Path(runs) / name, max_minutes=60 * HOURS - 5):
        yield event
        if isinstance(event, events.Saved) and not modal.is_local():
            volume.commit()  # a checkpoint outlives the machine
    if not modal.is_local():
        volume.commit()


@app.local_entrypoint()
def main(config: str = "small", source: str = "", name: str = "") -> None:
    """Start the remote training, and display its events here."""
    settings, text = chargpt_jax.load_config(config), None
    if source and Path(source).is_file():
        text = Path(source).read_bytes()
    elif source:
        settings.data.source = source
    chargpt_jax.show(train.remote_gen(settings, name or Path(config).stem, text))
