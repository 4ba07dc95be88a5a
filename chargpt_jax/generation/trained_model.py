"""A trained model: continue prompts, score texts."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from flax import nnx

from chargpt_jax.config import Config
from chargpt_jax.config.sections import MAX_TEXT
from chargpt_jax.config.values import argument, shown
from chargpt_jax.data.given_text import like_corpus, without_unknown
from chargpt_jax.data.repair import DEFAULT
from chargpt_jax.data.tokenizer import CharTokenizer, named
from chargpt_jax.devices import sharding
from chargpt_jax.devices.platform import compute_dtype
from chargpt_jax.errors import UserError
from chargpt_jax.generation.alternatives import Alternatives
from chargpt_jax.generation.arguments import (
    NO_CHARACTER,
    check_branched,
    check_scored,
    checked_alternatives,
    checked_callback,
    checked_count,
    checked_prompts,
    checked_repair,
    checked_samples,
    checked_seed,
    checked_skip,
    checked_stop,
    checked_stride,
    padded,
    text_pieces,
)
from chargpt_jax.generation.generate import DecodeState, bucket, decode, prefill
from chargpt_jax.generation.passages import Passages, passages
from chargpt_jax.generation.sample import Sample, Samples, branched, with_metrics
from chargpt_jax.generation.sampler import Sampler
from chargpt_jax.generation.samplers.chain import Chain, Given
from chargpt_jax.generation.samplers.stop import Ends
from chargpt_jax.generation.score import Scored, score_pieces, score_tokens
from chargpt_jax.model.init import Params, abstract_model
from chargpt_jax.ops.choose import ops_for
from chargpt_jax.training import optimizer
from chargpt_jax.training.dispatch.steps import state_shapes

PIECE = 2**16
"""Characters of a long text that are encoded at once."""

STREAMED = 16
"""Characters that are generated between two calls of `on_text` and `on_sample`."""


class Model:
    """A trained model with its vocabulary; `loading.load` makes one."""

    def __init__(
        self,
        config: Config,
        tokenizer: CharTokenizer,
        graphdef: nnx.GraphDef,
        params: Params,
        step: int,
        repairs: Sequence[Sequence[str]] = (DEFAULT,),
    ):
        """Put together what a checkpoint contains; `repairs`: the fixes that each text of the corpus got."""
        self.config, self.tokenizer, self.graphdef, self.params, self.step = config, tokenizer, graphdef, params, step
        self.repairs = repairs

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle the model without its compiled operations, which `loading.load` and a copy build alike."""
        return _rebuilt, (self.config, self.tokenizer, self.params, self.step, self.repairs)

    def generate(
        self,
        prompts: str | Sequence[str],
        max_new_tokens: int = 300,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        sampler: Given | Iterable[Given] | None = None,
        stop: str | Sequence[str] = (),
        n: int = 1,
        seed: int = 0,
        skip_unknown: bool = False,
        alternatives: int = 5,
        on_text: Callable[[int, str], None] | None = None,
        on_sample: Callable[[int, Sample], None] | None = None,
        repair: bool = True,
    ) -> Samples:
        """Continue one or more prompts.

        Args:
            prompts: strings of at least one character, which are repaired like the corpus (line ends, Unicode NFC,
                data.repair); the model reads the last block_size characters of a longer one.
                All prompts and continuations together have at most `MAX_CHARACTERS`.
            max_new_tokens: characters to generate, 1 to `MAX_TEXT`.
            temperature: sampling temperature; 0: greedy.
            top_k: sample from the k most likely characters; None: from all.
            top_p: nucleus sampling: from the fewest most likely characters with total probability of at least p.
            sampler: a chain of samplers in place of these three, as in "min_p=0.05,temperature=0.8", applied in the
                written order; also a function from (state, logits) to both, or a list of these (docs/samplers.md).
            stop: strings; a text ends as soon as it ends with one of them. Prompts count as text.
            n: samples per prompt; those of the first prompt are the first.
            seed: 0 or more, below 2**31; the same seed and prompts give the same text.
            skip_unknown: drop characters that are not in the vocabulary, instead of rejecting them.
            alternatives: number of the likeliest characters that a sample gives for every position, with the ranks and
                the sampler's probabilities; 0: none of these, which takes less time.
            on_text: called with (index of the prompt, new text) every 16 characters.
            on_sample: called with (index of the prompt, new part of its sample): first with the prompt, then every 16
                characters. The parts of a sample add up to it: part + part + ...
            repair: False: use the prompts exactly as they are.

        Raises:
            UserError: if an argument is invalid.
        """
        how_to_sample, on_text = Sampler(temperature, top_k, top_p, sampler), checked_callback("on_text", on_text)
        max_new_tokens, seed = checked_count(max_new_tokens), checked_seed(seed)
        on_sample, k = checked_callback("on_sample", on_sample), self._alternatives(alternatives)
        encoded, stop_ids = self._encoded(prompts, n, stop, skip_unknown, repair)
        size = self.config.model.vocab_size
        sampling = how_to_sample.with_key(jax.random.key(seed), self.tokenizer.vocabulary, size, stop_ids)
        tokens, lengths, wanted = padded(encoded, max_new_tokens)
        # Each process generates by itself, on its own devices.
        mesh = sharding.data_mesh(len(tokens), jax.local_devices(), tell=False)
        streamed = on_text is not None or on_sample is not None
        how: dict[str, Any] = {"graphdef": self.graphdef, "mesh": mesh, "final": not streamed}
        params = jax.device_put(self.params, sharding.replicated(mesh))
        width = min(self.config.model.block_size, bucket(int(lengths.max())), tokens.shape[1])
        state = prefill(params, tokens, lengths, width=width, alternatives=k, **how)
        part = functools.partial(self._part, chain=sampling.chain)
        read: list[Sample] = []
        if on_sample is not None:
            for i, ids in enumerate(encoded):
                read.append(self._read(state, i, ids))
                on_sample(i, read[i])
        readers = [self.tokenizer.reader(NO_CHARACTER) for _ in encoded]
        piece, ends = STREAMED if streamed else max_new_tokens, Ends([len(ids) for ids in encoded], stop_ids)
        for done in range(0, max_new_tokens, piece):
            count = min(piece, max_new_tokens - done)
            wanted[ends.found] = 0
            if not wanted.any():
                break
            state = decode(params, state, count * wanted, sampling, **how)
            ongoing = np.flatnonzero(wanted).tolist()
            ends.update(np.asarray(state.tokens), done + count)
            for i in ongoing:
                start, end = ends.part(i, done, done + count)
                if on_text is not None:
                    last = i in ends.found or done + count == max_new_tokens
                    on_text(i, readers[i](np.asarray(state.tokens)[i, start:end], last))
                if on_sample is not None:
                    on_sample(i, part(state, i, start, end))
        read = read or [self._read(state, i, ids) for i, ids in enumerate(encoded)]
        new = (part(state, i, *ends.part(i, 0, max_new_tokens)) for i in range(len(encoded)))
        return Samples(sample + rest for sample, rest in zip(read, new, strict=True))

    def branch(
        self,
        sample: Sample,
        at: int,
        alternative: str,
        max_new_tokens: int | None = None,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        sampler: Given | Iterable[Given] | None = None,
        stop: str | Sequence[str] = (),
        seed: int = 0,
        alternatives: int = 5,
        on_text: Callable[[int, str], None] | None = None,
        on_sample: Callable[[int, Sample], None] | None = None,
    ) -> Sample:
        """Continue a sample from another character.

        Args:
            sample: a text of this model's characters.
            at: the index of the character to replace, 0 or more; the text after it is dropped.
            alternative: the character to put there.
            max_new_tokens: characters to generate; None: as many as the sample has after the character, at least 1.
            temperature: as for `generate`, and so are the following ones.
            top_k: as for `generate`.
            top_p: as for `generate`.
            sampler: as for `generate`; a sampler's memory begins at the branch.
            stop: as for `generate`.
            seed: as for `generate`.
            alternatives: as for `generate`.
            on_text: as for `generate`; the index is 0.
            on_sample: as for `generate`; the index is 0.

        Returns:
            A sample whose prompt is sample.text[:at] + alternative. Before `at` it has the metrics of the sample.

        Raises:
            UserError: if an argument is invalid.
        """
        prompt, on_sample = branched(sample, at, alternative), checked_callback("on_sample", on_sample)
        check_branched(sample, at, alternative, self.config.model.vocab_size, self.tokenizer)
        count = max(1, len(sample) - len(prompt)) if max_new_tokens is None else max_new_tokens

        def on_part(i: int, part: Sample) -> None:
            if on_sample is not None:
                on_sample(i, with_metrics(part, sample, at) if part.prompt else part)

        how: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        how |= {"sampler": sampler, "stop": stop}
        how |= {"alternatives": alternatives, "on_text": on_text, "on_sample": on_part if on_sample else None}
        return with_metrics(self.generate(prompt, count, repair=False, **how)[0], sample, at)

    def _encoded(
        self, prompts: str | Sequence[str], n: int, stop: str | Sequence[str], skip_unknown: bool, repair: bool
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Return the token ids of each prompt, n times, and of each stop string; arguments as for `generate`."""
        prompts, skip_unknown, repair = checked_prompts(prompts), checked_skip(skip_unknown), checked_repair(repair)
        stop_ids = [self._stop_ids(string, repair) for string in checked_stop(stop)]
        prompts, n = [self._known(prompt, skip_unknown, repair) for prompt in prompts], checked_samples(n)
        return [ids for ids in map(self.tokenizer.encode_text, prompts) for _ in range(n)], stop_ids

    def _read(self, state: DecodeState, i: int, ids: np.ndarray) -> Sample:
        """Return prompt i, which `prefill` has read, with its metrics."""
        prompt = self.tokenizer.decode([ids])[0]
        if len(ids) <= self.config.model.block_size:
            return replace(self._part(state, i, 0, len(ids)), prompt=prompt)
        k = 0 if state.predictions is None else state.predictions.likeliest.shape[-1]
        return self._sample(prompt, tuple(prompt), self._measure(ids, alternatives=k))  # only its last window was read

    def _stop_ids(self, string: str, repair: bool) -> np.ndarray:
        """Return the token ids of a stop string, which is repaired like a prompt."""
        text = like_corpus(string, self.tokenizer, self.repairs) if repair else string
        if unknown := self.tokenizer.unknown(text):
            raise UserError(
                f"stop is {shown(string)}, but {named(unknown)} is not in the vocabulary of this model, so no text "
                "ends with it: leave it out."
            )
        return self.tokenizer.encode_text(text)

    def _part(self, state: DecodeState, i: int, start: int, stop: int, chain: Chain | None = None) -> Sample:
        """Return characters of sequence i with their metrics, copied: `decode` uses the state's memory again."""
        metrics = Scored(state.surprisal, state.entropy, state.predictions)  # type: ignore[arg-type]
        found = jax.tree.map(lambda x: np.array(np.asarray(x)[i, start:stop]), metrics)
        tokens = np.asarray(state.tokens)[i, start:stop]
        sample = self._sample("", tuple(self.tokenizer.decode_each([tokens], NO_CHARACTER)[0]), found)
        values = {name: np.array(np.asarray(x)[i, start:stop]) for name, x in state.series.items()}
        return replace(sample, series=chain.shown(values)) if chain is not None else sample

    def _sample(self, prompt: str, characters: tuple[str, ...], metrics: Scored) -> Sample:
        """Return a sample; `metrics` are of its characters."""
        found, kept = metrics.predictions, None
        if found is not None:
            likeliest = self.characters[np.asarray(found.likeliest)]
            kept = Alternatives(np.asarray(found.rank), likeliest, np.exp(found.log_p), np.asarray(found.sampled))
        size, unit = self.config.model.vocab_size, self.tokenizer.unit
        return Sample(prompt, characters, metrics.surprisal, metrics.entropy, size, kept, unit)

    @functools.cached_property
    def characters(self) -> np.ndarray:
        """The character of each token id, str [V]."""
        names = np.full(self.config.model.vocab_size, NO_CHARACTER)
        names[1 : self.tokenizer.n_ids] = self.tokenizer.vocabulary[1:]
        return names

    def _alternatives(self, wanted: int) -> int:
        """Check the number of alternatives; there are not more than characters."""
        return min(checked_alternatives(wanted), self.tokenizer.n_ids - 1)

    def score(
        self, text: str, *, stride: int | None = None, skip_unknown: bool = False, alternatives: int = 5
    ) -> Sample:
        """Compute the metrics of every character of a given text.

        Args:
            text: at least two characters; it is repaired like the corpus.
            stride: beyond block_size, each character is predicted from at least block_size - stride characters of
                context; 1 gives exactly the context of generation, at the cost of one window per character. None: half
                of block_size.
            skip_unknown: drop characters that are not in the vocabulary, instead of rejecting them.
            alternatives: as for `generate`.

        Raises:
            UserError: if an argument is invalid.
        """
        text, stride = self.known(text, skip_unknown), checked_stride(stride)
        check_scored(len(text))
        tokens = self.tokenizer.encode_text(text)
        return self._sample(text, tuple(text), self._measure(tokens, stride, self._alternatives(alternatives)))

    def score_long(
        self,
        pieces: Iterable[str],
        *,
        stride: int | None = None,
        skip_unknown: bool = False,
        alternatives: int = 5,
        on_progress: Callable[[int], None] | None = None,
    ) -> Passages:
        """Compute the loss of a text of any length, and find its most surprising passages, in constant memory.

        Args:
            pieces: the text in pieces of any length, which are repaired like the corpus, one by one.
            stride: as for `score`.
            skip_unknown: as for `score`.
            alternatives: as for `score`, for the passages.
            on_progress: called with the number of characters that are scored.

        Raises:
            UserError: if an argument is invalid.
        """
        text, pieces, k = "", text_pieces(pieces), self._alternatives(alternatives)
        stride, skip_unknown = checked_stride(stride), checked_skip(skip_unknown)

        def encoded() -> Iterator[np.ndarray]:
            nonlocal text
            for piece in pieces:
                repaired = self._repaired(piece, skip_unknown)
                for start in range(0, len(repaired), PIECE):
                    text += repaired[start : start + PIECE]
                    yield self.tokenizer.encode_text(repaired[start : start + PIECE])

        def scored() -> Iterator[Sample]:
            nonlocal text
            done, block_size, next_report = 0, self.config.model.block_size, 0
            how: dict[str, Any] = {"graphdef": self.graphdef, "block_size": block_size, "stride": stride}
            for metrics in score_pieces(self.params, encoded(), alternatives=k, **how):
                part, text = text[: len(metrics.surprisal)], text[len(metrics.surprisal) :]
                if part:
                    yield self._sample(part, tuple(part), metrics)
                done += len(part)
                if on_progress is not None and done >= next_report:
                    on_progress(done)
                    next_report = done + PIECE

        result = passages(scored())
        check_scored(result.characters)
        return result

    def _measure(self, tokens: np.ndarray, stride: int | None = None, alternatives: int = 0) -> Scored:
        how: dict[str, Any] = {"graphdef": self.graphdef, "block_size": self.config.model.block_size}
        return score_tokens(self.params, tokens, stride=stride, alternatives=alternatives, **how)

    def known(self, text: str, skip_unknown: bool = False) -> str:
        """Return a text repaired like the corpus; `skip_unknown` drops characters that are not in the vocabulary.

        Raises:
            UserError: if an argument is invalid, or the text has other characters than the vocabulary.
        """
        return self._known(argument("text", text, str, "give a text"), checked_skip(skip_unknown))

    def _known(self, text: str, skip_unknown: bool, repair: bool = True) -> str:
        given = text
        if repair:
            text = self._repaired(text, skip_unknown)
        elif skip_unknown:
            text = self.tokenizer.drop_unknown(text)
        if given and not text:
            raise UserError("No character of the text is in the vocabulary of this model: give another text.")
        if not text:
            raise UserError("The text is empty, but the model needs at least one character: try '\\n'.")
        if len(text) > MAX_TEXT:
            raise UserError(
                f"The text has {len(text):,} characters, but {MAX_TEXT:,} is the maximum: give a part of it."
            )
        return text

    def _repaired(self, text: str, skip_unknown: bool) -> str:
        if skip_unknown:
            return without_unknown(text, self.tokenizer, self.repairs)[0]
        return like_corpus(text, self.tokenizer, self.repairs)

    def unknown(self, text: str) -> list[str]:
        """Return the distinct characters of a text that `skip_unknown` drops."""
        return without_unknown(text, self.tokenizer, self.repairs)[1]


def _rebuilt(
    config: Config, tokenizer: CharTokenizer, params: Params, step: int, repairs: Sequence[Sequence[str]]
) -> Model:
    graphdef, _ = state_shapes_of(config, compute_dtype(config.amp))
    return Model(config, tokenizer, graphdef, params, step, repairs)


def state_shapes_of(config: Config, dtype: Any) -> tuple[nnx.GraphDef, Any]:
    """Return a model's static description, and its training state with shapes in place of arrays, on one device."""
    tx = optimizer.empty(config)
    graphdef, params = abstract_model(config.model, ops_for(dtype, config.model.attention_block))
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return graphdef, sharding.with_sharding(here, state_shapes(params, tx, 0, dtype))
