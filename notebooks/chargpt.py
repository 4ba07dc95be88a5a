# %% [markdown]
# # A small GPT learns to read, one character at a time
#
# Give a small transformer one old novel, *The Scarlet Pimpernel*, and let it guess the next character, again and again.
# At first it knows nothing. Then it finds out that `e` is common, that words end, that `q` wants a `u`; and in the end
# it writes something that looks like a novel from a little way off. This notebook takes you through all of it: find a
# text, find a learning rate, train, write, and see *where* the model was surprised.
#
# The work is done by the package `chargpt_jax`, a few short files that are meant to be read; each cell below is one
# stage and calls it. Run the cells from top to bottom.

# %% [markdown] tags=["colab"]
# **Before you start:** choose *Runtime > Change runtime type > v5e-1 TPU*. A GPU does as well; a CPU will do for a
# rehearsal (step 2).

# %% [markdown] tags=["kaggle"]
# **Before you start:** in the panel on the right choose *Settings > Accelerator > TPU v5e-8*, and turn *Internet* on,
# so that the package can be installed and the novel downloaded. A GPU does as well; a CPU will do for a rehearsal
# (step 2).

# %% [markdown]
# ## 1. Install, and meet the machine
#
# `SOURCE` says where the package comes from: its name, the path of a wheel or of a checkout, or `git+` followed by the
# address of its repository. JAX is left as this machine has it, since that build fits the hardware here.

# %%
SOURCE = "chargpt_jax"
# %pip install -q "{SOURCE}"

# %% tags=["colab"]
from pathlib import Path

CURE = "choose Runtime > Change runtime type > v5e-1 TPU, then Runtime > Run all"
RUNS = Path("runs")  # on the machine's own disk: quick, and gone with the machine; step 5 copies what is finished

# %% tags=["kaggle"]
from pathlib import Path

CURE = "choose Settings > Accelerator > TPU v5e-8, then Run > Run all"
RUNS = Path("/kaggle/working" if Path("/kaggle/working").is_dir() else "runs")  # kept when you save a version

# %%
import os
from importlib.metadata import version

import jax

import chargpt_jax
from chargpt_jax.devices.platform import compute_dtype

try:
    devices = jax.devices()
except RuntimeError:  # JAX was told to use a TPU, and there is none
    devices = []
promised = any(os.environ.get(name) for name in ("TPU_ACCELERATOR_TYPE", "COLAB_TPU_1VM", "COLAB_TPU_ADDR"))
if not devices or (promised and devices[0].platform == "cpu"):
    raise RuntimeError(f"This machine is said to have a TPU, but JAX cannot see it. Restart the session: {CURE}.")

print(f"{len(devices)} x {devices[0].device_kind}, computing in {compute_dtype(chargpt_jax.Config().amp).__name__}")
print(*(f"{name} {version(name)}" for name in ("chargpt_jax", "jax", "flax", "optax", "orbax-checkpoint", "numpy")))
if devices[0].platform == "cpu":
    print(f"There is no accelerator here: fine for a rehearsal, slow for the whole run. For a TPU, {CURE}.")

# %% [markdown]
# ## 2. The plan
#
# Everything that a run depends on is in one config. `small` is the run of the notebook that this one descends from:
# 15 layers, only 32 wide, 0.26 million parameters in all.
#
# It is yours to change, in the cell below, before the run begins. Some lines to try:
#
# ```python
# config.data.source = "1661"        # another book, by its number at Project Gutenberg, or the path of a .txt file
# config.data.start_at = ""          # from its very beginning
# config.model.n_layer = 6           # not so deep
# config.scheduler.epochs = 20.0     # not so long
# config.sample.prompts = ("The ",)  # what to go on from, in step 6
# ```
#
# A run remembers its config and refuses another one, so give a changed plan a `workdir` with a new name. With
# `REHEARSAL = True` everything is tiny, the text is one that comes with Python, and you see every stage in a minute or
# two, on any machine.

# %%
REHEARSAL = os.environ.get("CHARGPT_REHEARSAL") == "1"

if REHEARSAL:
    config = chargpt_jax.load_config("tiny")
    config.model.n_layer = 2
    config.model.remat = False  # quicker to compile
    config.scheduler.max_steps = 40
    config.lr_finder.num_zooms = 3
    config.train.validate_every = 0.05
    workdir = RUNS / "rehearsal"
else:
    config = chargpt_jax.load_config("small")
    workdir = RUNS / "small"

{section: vars(getattr(config, section)) for section in ("model", "data", "optimizer", "scheduler", "sample")}

# %% [markdown] tags=["colab"]
# If your Google Drive is mounted (the folder icon on the left, then *Mount Drive*) and holds a copy of this run from
# another day, the next cell brings it back, and everything goes on from there. Otherwise it does nothing.

# %% tags=["colab"]
import shutil

drive = Path("/content/drive/MyDrive")
backup = drive / "chargpt_jax" / f"{workdir.name}.zip"
if backup.exists() and not workdir.exists():
    shutil.unpack_archive(backup, workdir)

# %% [markdown]
# ## 3. The text
#
# The novel comes from Project Gutenberg; its licence pages are cut off and odd characters mended. If it cannot be had,
# a text that ships with Python stands in, and the line below says so.
#
# Each character becomes a number, its place in the sorted alphabet of this one book. The first part of the text (80 %
# in `small`) is for learning; the rest is held out, and tells us later whether the model has learnt English or only
# these pages.

# %%
chargpt_jax.show(chargpt_jax.prepare(config, workdir))

# %%
text = chargpt_jax.corpus_text(workdir)
print(text[:500])
print(f"\nThe alphabet of {len(set(text))} characters: {''.join(sorted(set(text)))!r}")

# %% [markdown]
# ## 4. The learning rate
#
# Too low a rate, and nothing is learnt; too high, and the loss flies off. So we try: a few steps from a fresh start, at
# rates that rise from absurdly low to absurdly high; then again in a narrower range, and again.
#
# Every curve is one of these zooms, and keeps only the steps that brought the loss to a new low. The circle on it marks
# where it falls most steeply, and so where learning is quickest: the circles wander from zoom to zoom, and the last one
# is the rate that we train with.

# %%
if chargpt_jax.info(workdir)["learning_rate"] is None:  # a rate that you gave, or found before, is kept
    chargpt_jax.show(chargpt_jax.find_lr(config, workdir))

# %% [markdown]
# ## 5. Training
#
# Now the long part. The blue line is the loss on the batches; the red one is the loss on the held-out text, in which
# every character is predicted once. Both are in nats, so that a blind guess among $n$ characters costs $\ln n$. While
# the two fall together, the model learns something that holds for pages it has never seen.
#
# After each validation a checkpoint is written. If the run is interrupted, by you or by the machine, **just run the
# cell again**: it goes on from the last checkpoint, and on the same hardware ends with the very numbers it would have
# had.

# %%
chargpt_jax.show(chargpt_jax.train(config, workdir))

# %% [markdown]
# Then a few samples are written into the `workdir`, and a page with all the numbers and pictures of the run.

# %%
chargpt_jax.write_samples(workdir)
report = chargpt_jax.write_report(workdir)

# %% [markdown] tags=["colab"]
# This machine's disk goes when the session ends. The next cell copies the run to your Google Drive, if that is mounted;
# you can also run it half way, after interrupting the training, to go on another day.

# %% tags=["colab"]
if drive.is_dir():
    shutil.make_archive(str(backup.with_suffix("")), "zip", workdir)
    print(f"The run is saved as {backup}.")
else:
    print(f"Google Drive is not mounted: the run is in {workdir.absolute()} only.")

# %% [markdown] tags=["kaggle"]
# The run is in the working folder: *Save Version* keeps it, under *Output*.

# %% [markdown]
# ## 6. Let it write
#
# We load the best checkpoint and give it some beginnings to go on from: they are in bold. Under each line of text three
# curves show what the model thought of each character; step 7 explains them, but you can already see it hesitate at the
# beginning of a word, and then spell it with confidence.

# %%
model = chargpt_jax.load(workdir)
model.generate(config.sample.prompts, max_new_tokens=300, temperature=0.8)

# %% [markdown]
# The model does not choose characters; it gives each of them a probability, and we choose. Always taking the likeliest
# (*greedy*) is safe and soon goes in circles. Drawing at temperature 1 takes the model at its word, slips included. A
# lower temperature is more careful; and `top_p=0.9` draws among the likeliest characters that make up 90 % of the
# probability, so that the long tail of unlikely ones is never drawn. Which of the four would you rather read?

# %%
from IPython.display import display

ways = {
    "greedy": {"temperature": 0.0},
    "temperature 0.7": {"temperature": 0.7},
    "temperature 1": {"temperature": 1.0},
    "temperature 1, top_p 0.9": {"temperature": 1.0, "top_p": 0.9},
}
for name, way in ways.items():
    print(name)
    display(model.generate(config.sample.prompts[0], max_new_tokens=160, **way))

# %% [markdown]
# ## 7. What surprises it?
#
# Before each character $x_t$ the model has a distribution $p_t$ over the $V$ characters it could be (here $V$ is the
# vocabulary's size, rounded up to a multiple of 64). From it come three numbers:
#
# $$h_t = -\sum_{c} p_t(c)\,\ln p_t(c) \qquad\qquad i_t = -\ln p_t(x_t) \qquad\qquad S_2 = \frac{i_t - h_t}{\ln V}$$
#
# * **Entropy** $h_t$: how unsure the model is before it looks. The filled area.
# * **Surprisal** $i_t$: how little it expected what then came. Its mean over a text is the loss that training lowers,
#   and $e^{i_t}$ is the perplexity: among how many equally likely characters the model seemed to be choosing.
# * **Surprise-surprise** $S_2$: how much *more* surprised it was than it expected to be. The surprisal that a model
#   expects, on average, is just its entropy; so in a text of its own, drawn at temperature 1, $S_2$ comes and goes
#   around zero. Where it stays above zero, the text is stranger than the model took it for.
#
# All three are taken before the temperature is applied. In the picture, entropy and surprisal are drawn as a part of
# $\ln V$.
#
# Let us try it on the end of the book, which the model has never seen: first as it stands, then with its words in
# another order, then with its letters in another order. The characters are the same all three times.

# %%
import random

words = text[-1000:].split()[1:31]
passage = " ".join(words)
shuffle = random.Random(0)
variants = [passage, " ".join(shuffle.sample(words, len(words))), "".join(shuffle.sample(passage, len(passage)))]

scores = [model.score(variant) for variant in variants]
for name, score in zip(("as written", "words shuffled", "letters shuffled"), scores, strict=True):
    print(f"{name:>16}: {score.loss:.3f} nats a character")
chargpt_jax.Samples(scores)

# %% [markdown]
# How much more the words cost in the wrong order is what the model knows of phrases; how much more the letters cost is
# what it knows of spelling. A model this small knows far more of the second.

# %% [markdown]
# ## 8. Where to go from here
#
# The page from step 5 is one file, with everything in it: keep it, or send it to somebody.

# %% tags=["colab"]
print(f"{report}: find it under the folder icon on the left, and download it with a right click")

# %% tags=["kaggle"]
from IPython.display import FileLink

FileLink(os.path.relpath(report))

# %% [markdown]
# Some things to try, each in a `workdir` of its own:
#
# * **Another book.** Any of Project Gutenberg's, or several with commas between. Where does the model hesitate in
#   another language?
# * **Another shape.** As many parameters in 4 wide layers as in these 15 narrow ones: which learns more in the same
#   time?
# * **Your own text.** `model.score("...")` of an e-mail, or of a page by the same author: where does $S_2$ rise? A
#   character that the book does not have is refused; `skip_unknown=True` drops it.
# * **Temperature as a resource.** Most of the choice in a text lies in the first letter of each word. What if the
#   temperature were high there, and low for the rest?
#
# ### References and licences
#
# * The text: [*The Scarlet Pimpernel*](https://www.gutenberg.org/ebooks/60) by Baroness Orczy, 1905, from Project
#   Gutenberg.
# * Andrej Karpathy, *nanoGPT*, 2022: [github.com/karpathy/nanoGPT](https://github.com/karpathy/nanoGPT). MIT licence,
#   © 2022 Andrej Karpathy. The shape of the model comes from there.
# * *mi-ni*: [github.com/z0u/mi-ni](https://github.com/z0u/mi-ni). Unlicense (public domain). The PyTorch notebook that
#   this one descends from: its range test, its metrics and the drawing under the lines.
# * `chargpt_jax` itself is under the MIT licence.
