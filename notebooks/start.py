# %% [markdown]
# ## 1. Install, and check the machine
#
# If the package is not installed yet, it is installed from the first of these: the checkout around this notebook, a
# wheel (`chargpt_jax-*.whl`) beside it, its repository, the package index. The preinstalled JAX stays, because that
# build fits the hardware.

# %% tags=["colab"]
from pathlib import Path

FIX = "choose Runtime > Change runtime type > v5e-1 TPU, then Runtime > Run all"
CURE = f"restart the session: {FIX}"
RUNS = Path("runs")  # a fast local disk, deleted with the machine; a copy of a run can be kept on Google Drive
WHEELS = [Path(), Path("/content"), Path("/content/drive/MyDrive"), Path("/content/drive/MyDrive/chargpt_jax")]
UPLOAD = "upload its wheel to the Files panel, or to your Google Drive and mount that"

# %% tags=["kaggle"]
from pathlib import Path

FIX = "choose Settings > Accelerator > TPU v5e-8, then Run > Run all"
CURE = f'run %pip install -U "jax[tpu]" in a new cell and restart the session; if it has no TPU, {FIX}'
RUNS = Path("/kaggle/working" if Path("/kaggle/working").is_dir() else "runs")  # saved with a version of the notebook
WHEELS = [Path(), *(path.parent for path in Path("/kaggle/input").rglob("chargpt_jax-*.whl"))]
UPLOAD = "add its wheel as an input (Add Input > Upload), or turn Internet on"

# %%
import importlib
import subprocess
import sys

ADDRESS = ""  # of the repository

try:
    import chargpt_jax.api
except ImportError:  # it is not installed, or something that it needs is not
    around = [path for path in (Path.cwd(), *Path.cwd().parents) if (path / "chargpt_jax" / "api.py").is_file()]
    wheels = [wheel for folder in WHEELS for wheel in sorted(folder.glob("chargpt_jax-*.whl"), reverse=True)]
    for source in (*around, *wheels, *([f"git+{ADDRESS}"] if ADDRESS else []), "chargpt_jax"):
        if subprocess.run([sys.executable, "-m", "pip", "install", "-q", source], capture_output=True).returncode == 0:
            break
    else:
        raise RuntimeError(f"chargpt_jax could not be installed: {UPLOAD}, then run this cell again.") from None
    importlib.invalidate_caches()

# %%
import os
from importlib.metadata import version

import jax

import chargpt_jax
from chargpt_jax.devices import compute_dtype
from chargpt_jax.devices.startup import use_every_core

use_every_core()  # of a CPU; a TPU or GPU is used in any case
try:
    devices = jax.devices()
except RuntimeError:  # JAX is configured for a TPU, but none is available
    devices = []
expects_tpu = any(os.environ.get(name) for name in ("TPU_ACCELERATOR_TYPE", "COLAB_TPU_1VM", "COLAB_TPU_ADDR"))
if not devices or (expects_tpu and devices[0].platform == "cpu"):
    raise RuntimeError(f"This machine should have a TPU, but JAX cannot see it: {CURE}.")

print(f"{len(devices)} x {devices[0].device_kind}, computing in {compute_dtype(chargpt_jax.Config().amp).__name__}")
print(*(f"{name} {version(name)}" for name in ("chargpt_jax", "jax", "flax", "optax", "orbax-checkpoint", "numpy")))
if devices[0].platform == "cpu":
    print(f"No accelerator found: this is fine for the test run, but slow for the full run. For a TPU, {FIX}.")
