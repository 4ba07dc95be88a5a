"""Numerical differences between a model and its exports, loaded by other libraries.

    python -m benchmarks.interchange [--original DIR]

A model of the original's shape with random parameters is exported in both formats. transformers and tokenizers load the
Hugging Face folder. With --original, the original's own code loads its arrays; DIR is a checkout of z0u/mi-ni at commit
2a991f7. Needs PyTorch and transformers; the original needs pydantic and jaxtyping.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import torch
from flax import nnx
from transformers import AutoModelForCausalLM, AutoTokenizer

from chargpt_jax.api import Model, load
from chargpt_jax.config import Config, ModelConfig
from chargpt_jax.data.tokenizer import CharTokenizer
from chargpt_jax.interop import convert
from chargpt_jax.interop.ancestor import to_params
from chargpt_jax.interop.array_names import Params
from chargpt_jax.model.init import create
from chargpt_jax.ops.choose import ops_for
from tests import reference

ALPHABET = " \n\t\r" + "".join(map(chr, range(33, 127))) + "é漢😀\u0301\u200d\u2028"
CONTEXT, GENERATED = 512, 400


def model() -> Model:
    """Return a model of the original's shape with random parameters."""
    tokenizer = CharTokenizer(ALPHABET)
    sizes = {"n_embd": 32, "n_head": 8, "n_head_dim": 8, "n_ff": 128, "n_layer": 15, "vocab_size": tokenizer.vocab_size}
    config = ModelConfig(**sizes, block_size=CONTEXT, used_ids=tokenizer.n_ids)
    drawn = reference.random_parameters(np.random.default_rng(0), **sizes)
    drawn["lm_head.weight"] = drawn["transformer.wte.weight"]
    params = to_params({name: array.astype(np.float32) for name, array in drawn.items()}, config)
    return Model(
        Config(model=config), tokenizer, create(config, 0, ops_for(query_block=config.attention_block))[0], params, 0
    )


def text(length: int) -> str:
    """Return random characters of the vocabulary."""
    return "".join(np.random.default_rng(1).choice(list(ALPHABET), length))


def distance(ours: Model, tokens: np.ndarray, theirs: torch.nn.Module) -> str:
    """Return the largest difference of the logits for tokens int32 [B, T], over the ids of characters."""
    found = jax.jit(lambda p, t: nnx.merge(ours.graphdef, p)(t))(ours.params, tokens)
    with torch.no_grad():
        given = theirs(torch.from_numpy(tokens).long())
    expected = getattr(given, "logits", given).numpy()
    return f"{np.abs(found - expected)[..., 1 : ours.tokenizer.n_ids].max():.1e}"


def of_characters(params: Params, n_ids: int) -> Params:
    """Return parameters without the embeddings of unused token ids, which an export for the original replaces."""
    return {**params, "wte": {"embedding": params["wte"]["embedding"][1:n_ids]}}


def hugging_face(ours: Model, folder: Path, tokens: np.ndarray) -> Iterator[tuple[str, str]]:
    """Compare with transformers and its tokenizer."""
    convert.export("hf", ours.config, ours.tokenizer, ours.params, folder, print)
    theirs = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    yield f"transformers, logits of {tokens.size:,} characters", distance(ours, tokens, theirs)

    prompt = text(20)
    found = theirs.generate(**tokenizer(prompt, return_tensors="pt"), do_sample=False, max_new_tokens=GENERATED)[0]
    own = ours.generate(prompt, GENERATED, temperature=0)[0]
    same = sum(a == b for a, b in zip(tokenizer.convert_ids_to_tokens(found)[20:], own.tokens[20:], strict=True))
    yield f"transformers, {GENERATED} characters generated greedily", f"{GENERATED - same} differ"

    sample = text(100_000)
    lost = sum(a != b for a, b in zip(tokenizer.decode(tokenizer(sample)["input_ids"]), sample, strict=True))
    yield f"its tokenizer, {len(sample):,} characters encoded and decoded", f"{lost} differ"


def original(ours: Model, folder: Path, checkout: Path, tokens: np.ndarray) -> Iterator[tuple[str, str]]:
    """Compare with the original's own model, and import its own checkpoint."""
    sys.path.insert(0, str(checkout / "src"))
    from experiment.config import TrainingConfig  # type: ignore[import-not-found]
    from experiment.model.gpt import GPT  # type: ignore[import-not-found]
    from safetensors.torch import load_file

    convert.export("original", ours.config, ours.tokenizer, ours.params, folder, print)
    config = TrainingConfig.model_validate_json((folder / "config.json").read_text(encoding="utf-8"))
    theirs = GPT(config.model).eval()
    theirs.load_state_dict(load_file(folder / "model.safetensors"))
    yield f"the original, logits of {tokens.size:,} characters", distance(ours, tokens, theirs)

    checkpoint = {"model": theirs.state_dict(), "config": config.model_dump(mode="json"), "metrics": None}
    torch.save(checkpoint, folder / "checkpoint.pt")
    back = load(convert.import_original(folder / "checkpoint.pt", folder / "run")).params
    both = (jax.tree.leaves(of_characters(params, ours.tokenizer.n_ids)) for params in (ours.params, back))
    pairs = list(zip(*(map(np.asarray, leaves) for leaves in both), strict=True))
    moved = sum(a.tobytes() != b.tobytes() for a, b in pairs)
    yield "its .pt file of this model, imported", f"{moved} of {len(pairs)} arrays differ in a bit"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", type=Path, help="a checkout of z0u/mi-ni at commit 2a991f7")
    checkout = parser.parse_args().original
    ours = model()
    tokens = np.random.default_rng(2).integers(0, ours.tokenizer.n_ids, (4, CONTEXT)).astype(np.int32)
    print("| what | largest difference |\n|---|---:|")
    with tempfile.TemporaryDirectory() as folder:
        for row in hugging_face(ours, Path(folder, "hf"), tokens):
            print("| {} | {} |".format(*row), flush=True)
        if checkout:
            for row in original(ours, Path(folder, "original"), checkout, tokens):
                print("| {} | {} |".format(*row), flush=True)


if __name__ == "__main__":
    main()
