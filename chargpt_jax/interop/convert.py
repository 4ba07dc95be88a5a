"""Import checkpoints of the original; export models for the original, for Hugging Face's transformers, for a browser.

ancestor.py, hugging_face.py and html_page.py describe the files and arrays of the formats. All input is checked before
any file is written, and a folder or a page is written atomically.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from chargpt_jax import atomic
from chargpt_jax.config import Config
from chargpt_jax.data.corpus import load_corpus
from chargpt_jax.data.tokenizer import CharTokenizer
from chargpt_jax.devices.platform import compute_dtype
from chargpt_jax.errors import UserError
from chargpt_jax.interop import html_page, hugging_face
from chargpt_jax.interop.ancestor import MULTIPLES, checked, from_original, from_params, read, to_original, to_params
from chargpt_jax.interop.array_names import Params
from chargpt_jax.interop.safetensors_file import write_safetensors
from chargpt_jax.interop.unused_ids import tied_row, with_unused_rows
from chargpt_jax.storage.checkpoint import UNVALIDATED, Checkpoints
from chargpt_jax.storage.workdir import Workdir
from chargpt_jax.training import optimizer
from chargpt_jax.training.run import record_of
from chargpt_jax.training.step import create_state

FOLDERS = ("original", "hf")
"""Formats that `export` writes as a folder."""

FORMATS = (*FOLDERS, "html")
"""Formats that `export` can write."""


def import_original(
    file: str | Path, workdir: str | Path, source: str | None = None, warn: Callable[[str], None] = print
) -> Path:
    """Create a run from a checkpoint of the original: its config, its vocabulary, and a checkpoint of step 0.

    Unused token ids keep their probability (`mask_unused_ids` is off), so that all results equal the original's.

    Args:
        file: .pt (read without torch; no code in it is executed), or .safetensors or .npz with the original's config
            next to it as config.json. A .safetensors file may contain the config as its metadata entry `config`.
        workdir: a new folder.
        source: the training text, as for `data.source`; without it the run cannot be evaluated or trained.
        warn: called with warnings about the text.

    Returns:
        The workdir.

    Raises:
        UserError: if the file, its config or an array is invalid; no file has been written then.
    """
    path, folder = Path(file).expanduser(), Workdir(workdir)
    folder.check_writable()
    with new_folder(folder.path, "--workdir") as partial:
        described, arrays = read(path)
        config, tokenizer = from_original(described, path)
        params = to_params(checked(arrays, config.model, path), config.model)
        tokens, sources = np.zeros(0, np.int32), []
        if source is not None:
            config.data.source = source
            text, found = load_corpus(config.data, warn=warn)
            if unknown := tokenizer.unknown(text):
                raise UserError(
                    f"The text of {source!r} has {unknown[0]!r} (U+{ord(unknown[0]):04X}), which is not in "
                    "the imported vocabulary: give the text that the model was trained on."
                )
            tokens, sources = tokenizer.encode_text(text), [dataclasses.asdict(one) for one in found]
        _write_run(Workdir(partial), config, tokenizer, params, tokens, sources)
    return folder.path


def _write_run(
    folder: Workdir,
    config: Config,
    tokenizer: CharTokenizer,
    params: Params,
    tokens: np.ndarray,
    sources: list[dict[str, Any]],
) -> None:
    folder.save_corpus(tokenizer, tokens if len(tokens) else None, sources)
    folder.save_config(config)
    record = record_of(config, tokenizer.vocabulary, tokens)
    tx = optimizer.empty(config)
    state = create_state(jax.device_put(params), tx, config.seed, compute_dtype(config.amp))
    store = Checkpoints(folder.checkpoints)
    try:
        store.save(state, record, UNVALIDATED)
    finally:
        store.close()


def export_place(form: str, out: str | Path) -> Path:
    """Check the format and the path of an export, before the model is loaded, and return the path.

    Raises:
        UserError: if the format is unknown, the folder exists and is not empty, or the page exists or is named as
            something else.
    """
    if form not in FORMATS:
        raise UserError(f"The format is {form!r}, but it must be one of {', '.join(FORMATS)}: choose one.")
    path = Path(out).expanduser().absolute()
    if form == "html":
        _check_new_page(path)
    else:
        _check_vacant(path, "--out")
    return path


def export(
    form: str,
    config: Config,
    tokenizer: CharTokenizer,
    params: Params,
    out: str | Path,
    warn: Callable[[str], None],
    about: html_page.About | None = None,
) -> Path:
    """Write a model to a new folder, or to a new HTML file.

    Args:
        form: one of FORMATS. 'original': config.json, and model.safetensors, whose arrays the original's
            `load_state_dict` accepts. 'hf': a folder for transformers' AutoModelForCausalLM and AutoTokenizer.
            'html': one file, a page that runs the model.
        config: the run's config.
        tokenizer: the run's tokenizer.
        params: nested dicts of arrays.
        out: must not exist, or be an empty folder; for 'html' it must not exist.
        warn: called with warnings about the target format.
        about: what a page says about the model; None: only its config.

    Raises:
        UserError: if the format, the path or the model is invalid; no file has been written then.
    """
    path = export_place(form, out)
    if config.model.kind != "gpt":
        raise UserError(
            f"model.kind is {config.model.kind!r}, but only a 'gpt' can be exported: train one with "
            "--config.model.kind=gpt."
        )
    if tokenizer.unit == "byte":
        raise UserError(
            "The tokens of this model are bytes, but an exported model has characters: train one with "
            "--config.data.unit=character."
        )
    params = jax.tree.map(np.asarray, params)
    if form == "html":
        _write_page(path, html_page.page(config, tokenizer, params, about or html_page.About(path.stem)))
        return path
    with new_folder(path, "--out") as partial:
        if form == "hf":
            hugging_face.write(partial, config, tokenizer, params)
        else:
            _write_original(partial, config, tokenizer, params, warn)
    return path


def _write_page(path: Path, content: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic.replacing(path) as file:
            file.write(content.encode())
            _check_new_page(path)  # another process may have written it
    except OSError as error:
        raise _unusable(path, "--out", error, "file") from None


def _check_new_page(path: Path) -> None:
    if path.suffix.lower() not in (".html", ".htm"):
        better = str(path / "model.html" if os.path.isdir(path) else path.with_name(f"{path.name}.html"))
        raise UserError(
            f"--out is {str(path)!r}, but --format=html writes one file, whose name must end in .html: give {better!r}."
        )
    try:
        taken = path.is_symlink() or path.exists()
    except OSError as error:
        raise _unusable(path, "--out", error, "file") from None
    if taken:
        raise UserError(f"--out is {str(path)!r}, which exists already: give the name of a new file.")


def _write_original(
    folder: Path, config: Config, tokenizer: CharTokenizer, params: Params, warn: Callable[[str], None]
) -> None:
    odd = [f"{name} a multiple of {n}" for name, n in MULTIPLES.items() if getattr(config.model, name) % n]
    if odd:
        warn(f"The original's config requires {', '.join(odd)}, so the original will reject this model.")
    if config.model.mask_unused_ids:
        params = _without_unused_ids(config, params, warn)
    described = json.dumps(to_original(config, tokenizer), indent=2) + "\n"
    (folder / "config.json").write_text(described, encoding="utf-8")
    arrays = from_params(params, config.model)
    write_safetensors(folder / "model.safetensors", arrays, {"format": "pt", "config": described})


def _without_unused_ids(config: Config, params: Params, warn: Callable[[str], None]) -> Params:
    """Return parameters whose unused token ids have a probability of 0 in the original, which does not mask them."""
    row, table = tied_row(params["ln_f"]["scale"], params["ln_f"]["bias"]), params["wte"]["embedding"]
    if row is None:
        warn(
            "The original does not mask unused token ids, and no weights can replace the mask in this model (the scale "
            "of its final LayerNorm has zeros, or sum(bias / scale) is almost 0), so the original's loss will be "
            "higher: train longer, or use --format=hf."
        )
        return params
    if config.data.padding_chance:
        warn(
            "The original does not mask unused token ids, and the weights that replace the mask overwrite the trained "
            "embedding of padding: give the original prompts without padding."
        )
    return {**params, "wte": {"embedding": with_unused_rows(table, config.model.used_ids, row)}}


@contextlib.contextmanager
def new_folder(path: Path, flag: str) -> Iterator[Path]:
    """Yield a folder to fill, which becomes `path` at the end of the block, or is removed if the block fails.

    Without its config.json, which appears last, an incomplete folder is neither a run nor an exported model.

    Raises:
        UserError: naming the flag, if `path` is taken or no folder can be created there.
    """
    _check_vacant(path, flag)
    with contextlib.ExitStack() as stack:
        try:
            partial = stack.enter_context(atomic.creating_folder(path, last="config.json"))
        except OSError as error:
            raise _unusable(path, flag, error) from None
        yield partial


def _check_vacant(path: Path, flag: str) -> None:
    try:
        # A link to nothing could not be replaced by the folder.
        taken = (path.is_symlink() or path.exists()) and not (path.is_dir() and not any(path.iterdir()))
    except OSError as error:
        raise _unusable(path, flag, error) from None
    if taken:
        raise UserError(f"{flag} is {str(path)!r}, which exists already: give a new or empty folder.")


def _unusable(path: Path, flag: str, error: OSError, kind: str = "folder") -> UserError:
    return UserError(f"Cannot use {flag}={str(path)[:80]!r} ({error.strerror}): choose another {kind}.")
