# %% [markdown]
# # What the model knows
#
# This notebook explores a trained model: what it expects in *your* text, what it would have written instead, where it
# is unsure, which earlier characters it reads, and which of its layers decides. It needs a run of the notebook *A small
# GPT learns to read*, or of `python -m chargpt_jax.main`. If it finds none, it trains a small model first, which takes
# about a minute.
#
# Point at a character of any text below, or click on a text and use the arrow keys: a panel shows what the model
# expected there.

# %% [markdown] tags=["colab"]
# **Before you start:** mount your Google Drive if it holds your run (the folder icon on the left, then *Mount Drive*).
# A CPU is enough for this notebook.

# %% [markdown] tags=["kaggle"]
# **Before you start:** add the output of your training notebook as an input (*Add Input > Notebook Output*), if it is
# another notebook. A CPU is enough for this notebook.

# %% [markdown] tags=["include"]
# start.py

# %% [markdown]
# ## 2. The model
#
# The next cell takes the newest run that it finds. To use another one, write its folder into `RUN`.

# %% tags=["colab"]
PLACES = [RUNS, Path("/content/drive/MyDrive/chargpt_jax")]

# %% tags=["kaggle"]
PLACES = [RUNS, *Path("/kaggle/input").glob("**/runs"), *Path("/kaggle/input").glob("*")]

# %%
RUN = ""  # such as "runs/small"
TEXT = ""  # if a model must be trained first: the path of your own text; empty: the help texts of Python

TEST_RUN = os.environ.get("CHARGPT_TEST_RUN") == "1"

configs = [path for place in PLACES for path in place.glob("*/config.json") if any(path.parent.glob("checkpoints/*"))]
newest = max(configs, key=os.path.getmtime, default=None)
run = Path(RUN) if RUN else newest.parent if newest else None
if run is None:
    run = RUNS / "tiny"
    config = chargpt_jax.load_config("tiny")
    config.data.source = TEXT or config.data.source
    if TEST_RUN:
        config.scheduler.max_steps = 40
        config.lr_finder.num_zooms = 3
    chargpt_jax.show(chargpt_jax.run(config, run))

model = chargpt_jax.load(run)
try:
    unseen = chargpt_jax.corpus_text(run, "validation")[-20_000:]  # the model has not seen the validation set
except chargpt_jax.UserError as error:  # an imported model may have no text
    print(error)
    unseen = "The quick brown fox jumps over the lazy dog. "
shape = model.config.model
print(f"{run}: step {model.step}, {shape.n_layer} layers, {len(model.tokenizer.vocabulary) - 1} characters")

# %% [markdown]
# ## 3. Your own text
#
# Write or paste your own text below: an e-mail, a poem, a paragraph of another book. If you leave it empty, the end of
# the model's own text is used, which it has not seen. A character that the model does not know is dropped.
#
# The grey area is the entropy: how unsure the model was before each character. The blue line is the surprisal: how
# unlikely the character was. The red line is S₂: above zero, the character was more surprising than the model expected.

# %%
yours = """

"""

own = yours.strip() or unseen[-400:].strip()
if dropped := model.unknown(own):
    print(f"The model does not know {''.join(dropped)!r}: these characters are dropped.")
scored = model.score(own, skip_unknown=True)
scored

# %% [markdown]
# These are the characters that surprised it most, with what it expected there.

# %%
import numpy as np

for i in sorted(1 + np.argsort(-scored.surprisal[1:])[:10]):
    before = "".join(scored.tokens[max(0, i - 20) : i])
    expected = ", ".join(f"{character!r} {p:.0%}" for character, p in scored.alternatives.at(i)[:3])
    print(f"{before!r:>26} then {scored.tokens[i]!r}: rank {scored.rank[i]}; expected {expected}")

# %% [markdown]
# ## 4. What if another character had come?
#
# The model continues the start of your text at temperature 0.7. Then we go back to the place where it was least sure,
# put each of its three first choices there, and let it continue greedily from each. The texts differ from one character
# on: the model decides what to write one character at a time.

# %%
(sample,) = model.generate(scored.text[:40], max_new_tokens=120, temperature=0.7)
start = len(sample.prompt)
unsure = start + int(np.argmax(sample.entropy[start : start + 60]))
choices = [character for character, _ in sample.alternatives.at(unsure)[:3]]
branches = {repr(choice): model.branch(sample, unsure, choice, temperature=0.0) for choice in choices}
chargpt_jax.Comparison({"as it was sampled": sample, **branches})

# %% [markdown]
# ## 5. Temperatures side by side
#
# The four texts have one prompt and one seed. *Greedy* always takes the first choice. A lower temperature makes likely
# characters more likely; `top_p` leaves out the many unlikely ones. The numbers above each text are means: at
# temperature 1, surprisal and entropy are about equal, because the model expects text of its own kind. Below that, the
# text is less surprising than the model expects.

# %%
ways = {
    "greedy": {"temperature": 0.0},
    "temperature 0.5": {"temperature": 0.5},
    "temperature 1": {"temperature": 1.0},
    "temperature 1, top_p 0.9": {"temperature": 1.0, "top_p": 0.9},
}
prompt = scored.text[:20]
chargpt_jax.Comparison({name: model.generate(prompt, max_new_tokens=200, **way)[0] for name, way in ways.items()})

# %% [markdown]
# ## 6. The start of a word is the hard part
#
# Where is the model unsure? The plot shows the mean entropy and surprisal by the letter of the word, on text that the
# model has not seen. The first letter decides which word it is; after it, there are few possibilities left.

# %%
letters = chargpt_jax.by_letter(model.score(unseen))
print(f"First letters have {letters.first_letters:.0%} of the surprisal of the text.")
letters

# %% [markdown]
# ## 7. What does it read?
#
# Before it predicts the next character, each head of each layer looks back and gives every earlier character a weight.
# Each map below is one head. A row belongs to one character of the line, and its dark squares are the characters that
# it reads. A diagonal right below the edge is a head that reads the character before. Vertical stripes are a head that
# reads certain characters, such as spaces, wherever they are.

# %%
line = scored.text[: min(60, shape.block_size)]
inside = chargpt_jax.inspect(model, line)
inside.attention_maps()

# %% [markdown]
# The next cell enlarges the head that looks back furthest on average.

# %%
T = len(line)
distance = np.arange(T)[:, None] - np.arange(T)
reach = (inside.attention * distance).sum(axis=-1).mean(axis=-1)  # characters, for each layer and head
layer, head = np.unravel_index(reach.argmax(), reach.shape)
print(f"Layer {layer + 1}, head {head + 1} looks back {reach.max():.1f} characters on average.")
inside.attention_maps(layer=int(layer) + 1, head=int(head) + 1)

# %% [markdown]
# ## 8. Which layer settles each character?
#
# The layers work one after the other on the same vector. Each row below reads this vector after one more layer with the
# model's output layer, as if the model ended there (a *logit lens*). Row 0 is the embedding alone; the last row is the
# model's prediction. The curves are entropy and surprisal as above. A dot marks the row from which on the first choice
# no longer changes: there, the character is settled.

# %%
inside  # the lens

# %%
size = min(100, shape.block_size)
parts = [unseen[i : i + size] for i in range(0, 20 * size, size)]
settled = np.concatenate([chargpt_jax.inspect(model, part).settled[1:] for part in parts])
for k, count in enumerate(np.bincount(settled, minlength=shape.n_layer + 1)):
    print(f"settled after {k:2} layers: {count / len(settled):5.1%} of the characters")

# %% [markdown]
# Some things to try:
#
# * **Two models on one text.** `model.score(yours) - other.score(yours)` shows where one is more surprised than the
#   other, if both know the characters.
# * **A spelling error.** Put one into your text. How many characters does the model need to recover?
# * **A name.** Write a name from the book three times. Does the model expect it the third time? Which head reads the
#   earlier ones?
# * **Another model.** Train 4 wide layers instead of many narrow ones, and look at section 8 again.
