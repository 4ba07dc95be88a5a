# %% [markdown]
# # A small GPT learns to read, one character at a time
#
# A small transformer reads one old novel, *The Scarlet Pimpernel*, and learns to predict the next character. At first
# it guesses blindly. Then it learns that `e` is common, that words end, and that `u` follows `q`. In the end it
# generates text that looks like a novel from a distance. This notebook shows all stages: get a text, find a learning
# rate, train, generate, and see *where* the model was surprised.
#
# The package `chargpt_jax` does the work; its files are short and meant to be read. Each cell below runs one stage. Run
# the cells from top to bottom.

# %% [markdown] tags=["colab"]
# **Before you start:** choose *Runtime > Change runtime type > v5e-1 TPU*. A GPU works too. A CPU is enough for the
# short test run in step 2.

# %% [markdown] tags=["kaggle"]
# **Before you start:** in the panel on the right choose *Settings > Accelerator > TPU v5e-8*, and turn *Internet* on,
# so that the package can be installed and the novel downloaded. A GPU works too. A CPU is enough for the short test run
# in step 2.

# %% [markdown] tags=["include"]
# start.py

# %% [markdown]
# ## 2. The config
#
# One config holds every setting of a run. `small` is the model of the original notebook: 15 layers of width 32,
# 0.26 million parameters.
#
# You can change it in the cell below, before the run starts. Some lines to try:
#
# ```python
# config.data.source = "1661"        # another book, by its number at Project Gutenberg, or the path of a .txt file
# config.data.start_at = ""          # use the full text
# config.model.n_layer = 6           # fewer layers
# config.scheduler.epochs = 20.0     # a shorter run
# config.sample.prompts = ("The ",)  # the prompts to continue in step 6
# ```
#
# A run saves its config and refuses a different one, so use a new `workdir` for a changed config.
#
# With `TEST_RUN = True`, the model is tiny, the text is one that ships with Python, and all stages take a minute or two
# on any machine.

# %%
TEST_RUN = os.environ.get("CHARGPT_TEST_RUN") == "1"

if TEST_RUN:
    config = chargpt_jax.load_config("tiny")
    config.model.n_layer = 2
    config.model.remat = False  # compiles faster
    config.scheduler.max_steps = 40
    config.lr_finder.num_zooms = 3
    config.train.validate_every = 0.05
    workdir = RUNS / "test_run"
else:
    config = chargpt_jax.load_config("small")
    workdir = RUNS / "small"

{section: vars(getattr(config, section)) for section in ("model", "data", "optimizer", "scheduler", "sample")}

# %% [markdown] tags=["colab"]
# The disk of this machine is deleted when the session ends. If your Google Drive is mounted (the folder icon on the
# left, then *Mount Drive*), step 5 keeps a copy of the run there. If Drive has a copy of this run from an earlier
# session, the next cell restores it, and the run resumes from there.

# %% tags=["colab"]
drive = Path("/content/drive/MyDrive")
backup = drive / "chargpt_jax" / workdir.name
if not drive.is_dir():
    print("Google Drive is not mounted: the run is only on the disk of this machine.")
elif (backup / "config.json").exists() and not workdir.exists():
    chargpt_jax.copy_run(backup, workdir)

# %% [markdown]
# ## 3. The text
#
# The novel is downloaded from Project Gutenberg. The licence text is removed, and encoding errors are repaired. If the
# download fails, the run uses a text that ships with Python instead, and the line below says so.
#
# Each character becomes a number: its index in the sorted list of the book's characters. The first part of the text
# (80 % in `small`) is the training set. The rest is the validation set: it shows later whether the model has learnt
# English or only these pages.

# %%
chargpt_jax.show(chargpt_jax.prepare(config, workdir))

# %%
text = chargpt_jax.corpus_text(workdir)
print(text[:500])
print(f"\nThe {len(set(text))} distinct characters: {''.join(sorted(set(text)))!r}")

# %% [markdown]
# ## 4. The learning rate
#
# With a low learning rate the model learns too slowly; with a high one the loss diverges. The range test finds a value
# in between. It runs several *zooms*. Each zoom trains a few steps from the initial parameters, with increasing
# learning rates; the next zoom uses a narrower range.
#
# Each curve is one zoom. It shows only the steps that reached a new lowest loss. The circle marks the steepest descent,
# where the model learns fastest. The circle of the last zoom is the learning rate of the training.

# %%
if chargpt_jax.info(workdir)["learning_rate"] is None:  # a learning rate that is set, or was found before, is kept
    chargpt_jax.show(chargpt_jax.find_lr(config, workdir))

# %% [markdown]
# ## 5. Training
#
# This is the long part. The blue line is the training loss; the red line is the validation loss, in which every
# character of the validation set is predicted once. Both are in nats: a blind guess among $n$ characters has a loss of
# $\ln n$. While both fall, the model learns something that also holds for pages that it has not seen.
#
# After each validation a checkpoint is saved. If the run is interrupted, by you or by the machine, **run the cell
# again**: it resumes from the last checkpoint. On the same hardware and versions the result is bit-identical to an
# uninterrupted run.

# %% tags=["kaggle"]
chargpt_jax.show(chargpt_jax.train(config, workdir))

# %% tags=["colab"]
events = chargpt_jax.train(config, workdir)
if drive.is_dir():
    backup.parent.mkdir(exist_ok=True)
    events = chargpt_jax.backed_up(events, workdir, backup)  # copies each checkpoint to Google Drive
chargpt_jax.show(events)

# %% [markdown]
# The next cell saves a few samples and a report with all numbers and plots to the `workdir`.

# %%
chargpt_jax.write_samples(workdir)
report = chargpt_jax.write_report(workdir)

# %% [markdown] tags=["kaggle"]
# The run is in the working folder. *Save Version* saves it under *Output*.

# %% [markdown]
# ## 6. Generate text
#
# We load the best checkpoint and let it continue some prompts, which are shown in bold. Three curves under each line of
# text show metrics for each character; step 7 explains them. You can already see that the model is unsure at the start
# of a word, and certain about the rest of it.

# %%
model = chargpt_jax.load(workdir)
model.generate(config.sample.prompts, max_new_tokens=300, temperature=0.8)

# %% [markdown]
# The model gives each character a probability, and the sampler chooses one. *Greedy* sampling always takes the most
# likely character; it soon repeats itself. Temperature 1 samples from the probabilities as they are. A lower
# temperature prefers likely characters. `top_p=0.9` samples from the most likely characters with a total probability of
# 90 %, so the many unlikely ones are never chosen. Which of the four would you rather read?

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
# Point at a character, or click on a text and use the arrow keys: the panel shows the characters that the model would
# have preferred there. To see what the text would have become with another one, branch: the next cell takes the
# most likely other character in the middle of a sample, and lets the model continue from it.

# %%
(sample,) = model.generate(config.sample.prompts[0], max_new_tokens=160, temperature=0.7)
middle = len(sample) // 2
other = next(c for c, _ in sample.alternatives.at(middle) if c != sample.tokens[middle])
display(sample, model.branch(sample, middle, other, temperature=0.7))

# %% [markdown]
# ## 7. What surprises it?
#
# Before each character $x_t$ the model has a distribution $p_t$ over $V$ possible characters ($V$ is the vocabulary
# size, rounded up to a multiple of 64). Three metrics follow from it:
#
# $$h_t = -\sum_{c} p_t(c)\,\ln p_t(c) \qquad\qquad i_t = -\ln p_t(x_t) \qquad\qquad S_2 = \frac{i_t - h_t}{\ln V}$$
#
# * **Entropy** $h_t$: how unsure the model is before it sees the character. It is the filled area.
# * **Surprisal** $i_t$: how unlikely the character was under the model. Its mean over a text is the loss, and $e^{i_t}$
#   is the perplexity: the number of equally likely characters with the same surprisal.
# * **Surprise-surprise** $S_2$: how much *more* surprised the model was than it expected. The expected surprisal is the
#   entropy. So for text sampled from the model at temperature 1, $S_2$ varies around zero. Where it stays above zero,
#   the text is more unusual than the model expected.
#
# All three are computed before the temperature is applied. The picture shows entropy and surprisal as fractions of
# $\ln V$.
#
# We score the end of the book, which the model has not seen, in three versions: as written, with shuffled words, and
# with shuffled letters. All three have the same characters.

# %%
import random

words = text[-1000:].split()[1:31]
passage = " ".join(words)
shuffle = random.Random(0)
variants = [passage, " ".join(shuffle.sample(words, len(words))), "".join(shuffle.sample(passage, len(passage)))]

scores = [model.score(variant) for variant in variants]
for name, score in zip(("as written", "words shuffled", "letters shuffled"), scores, strict=True):
    print(f"{name:>16}: {score.loss:.3f} nats per character")
chargpt_jax.Samples(scores)

# %% [markdown]
# The increase for shuffled words shows how much the model has learnt about phrases; the increase for shuffled letters
# shows how much it has learnt about spelling. A model of this size learns far more about spelling.

# %% [markdown]
# ## 8. Where to go from here
#
# The report from step 5 is a single file, which you can keep or share.

# %% tags=["colab"]
print(f"{report}: open the folder icon on the left, and download the file with a right click")
if drive.is_dir():
    chargpt_jax.copy_run(workdir, backup)  # the samples and the report, too

# %% tags=["kaggle"]
from IPython.display import FileLink

FileLink(os.path.relpath(report))

# %% [markdown]
# Some things to try, each in its own `workdir`:
#
# * **Another book.** Use any number of Project Gutenberg, or several, separated by commas. Where is the model unsure in
#   another language?
# * **Another shape.** Use the same number of parameters in 4 wide layers instead of 15 narrow ones. Which model learns
#   more in the same time?
# * **Your own text.** Use `model.score("...")` on an e-mail, or on a page by the same author. Where does $S_2$ rise? A
#   character that is not in the vocabulary is an error; `skip_unknown=True` drops it.
# * **Variable temperature.** The first letter of a word is the least certain one. What happens with a high temperature
#   there and a low one for the rest?
#
# ### References and licences
#
# * The text: [*The Scarlet Pimpernel*](https://www.gutenberg.org/ebooks/60) by Baroness Orczy, 1905, from Project
#   Gutenberg.
# * Andrej Karpathy, *nanoGPT*, 2022: [github.com/karpathy/nanoGPT](https://github.com/karpathy/nanoGPT). MIT licence,
#   © 2022 Andrej Karpathy. The shape of the model comes from it.
# * *mi-ni*: [github.com/z0u/mi-ni](https://github.com/z0u/mi-ni). Unlicense (public domain). The original PyTorch
#   notebook: range test, metrics and the curves under the text.
# * `chargpt_jax` has the MIT licence.
