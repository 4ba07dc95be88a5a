// A text that a model reads and continues, as in chargpt_jax/generation/generate.py and score.py.
//
// The methods with a star are generators. They yield lists of new tokens, some of them empty, after each small piece of
// work: a page can draw between two pieces, or abandon the rest.

const NO_CHARACTER = "\ufffd"; // stands for a token id that has no character
const UNPREDICTED = { surprisal: null, entropy: null, s2: null, rank: null, likeliest: [] }; // of the first token
const PIECE = 4e6; // products per piece of work: some milliseconds
const [MIN_PIECE, MAX_PIECE] = [4, 64]; // positions per piece, which are even: `multiply` computes two at once

class Session {
  /**
   * @param model from createModel.
   * @param vocabulary the character of each used token id; that of padding is "".
   * @param alternatives number of the most likely characters that a token gets.
   */
  constructor(model, vocabulary, alternatives = 5) {
    this.model = model;
    this.characters = vocabulary;
    this.idOf = new Map(vocabulary.slice(1).map((character, i) => [character, i + 1]));
    this.count = Math.min(alternatives, this.idOf.size);
    const pairs = Math.floor(PIECE / model.parameters / 2);
    this.piece = Math.max(MIN_PIECE, Math.min(MAX_PIECE, 2 * pairs));
    this.cache = createCache(model);
    this.clear();
  }

  /** Forget the text. */
  clear() {
    this.tokens = [];
    this.reading = false; // whether a part of the prompt has not been read yet
    this.#begin(0);
  }

  /**
   * Return a text in the form with the fewest unknown characters: unchanged, in Unicode's NFC, or with straight quotes.
   *
   * Corpora are repaired like that, those of Project Gutenberg also with straight quotes; phones type curly ones.
   */
  repaired(text) {
    const composed = text.normalize("NFC");
    const straight = composed.replace(/[\u2018\u2019\u02bc]/g, "'").replace(/[\u201c\u201d]/g, '"');
    const forms = [text, composed, straight];
    const counts = forms.map((form) => [...form].filter((character) => !this.idOf.has(character)).length);
    return forms[counts.indexOf(Math.min(...counts))];
  }

  /** Return the characters of a text that are not in the vocabulary, each once. */
  unknown(text) {
    return [...new Set(text)].filter((character) => !this.idOf.has(character));
  }

  /**
   * Begin a new text with a prompt, whose characters are all in the vocabulary, and measure it.
   *
   * A prompt beyond block_size is measured as a text is scored: in windows that overlap by half.
   */
  *read(prompt) {
    const size = this.model.config.block_size;
    const ids = Array.from(prompt, (character) => this.idOf.get(character));
    this.clear();
    this.reading = true;
    for (let start = 0; this.tokens.length < ids.length; start += Math.max(1, size >> 1)) {
      if (start) this.#begin(start);
      else yield this.#add(ids[0], UNPREDICTED, true, null);
      const end = Math.min(start + size, ids.length - 1); // the last character is read to predict the next one
      for (let at = start; at < end; at += this.piece) {
        const part = ids.slice(at, Math.min(at + this.piece, end));
        const known = this.tokens.length; // the window predicts the tokens from here on
        const wanted = Math.max(0, at + part.length + 1 - known);
        const rows = this.#rows(readTokens(this.model, this.cache, part, wanted));
        yield rows.flatMap((row, i) => this.#add(ids[known + i], this.#metrics(row, ids[known + i]), true, null));
      }
    }
    this.reading = false;
  }

  /**
   * Continue the text by `count` characters.
   *
   * @param sampler temperature and topK, as for sampleToken, and the seed: a token depends on it and on its position.
   */
  *write(count, sampler) {
    for (let i = 0; i < count; i++) {
      const logits = yield* this.#predict();
      const { id, p } = sampleToken(logits, sampler, randomAt(sampler.seed, this.tokens.length));
      yield this.#add(id, this.#metrics(logits, id), false, p);
    }
  }

  /** Cut the text before a token, and put one of its alternatives there. */
  branch(index, text) {
    const { entropy, likeliest, alternatives } = this.tokens[index];
    const [id, p] = likeliest[alternatives.findIndex(([character]) => character === text)];
    const rank = 1 + likeliest.filter(([, other]) => other > p).length;
    this.reading = false;
    this.tokens.length = index;
    this.cache.length = Math.max(0, Math.min(this.cache.length, index - this.start));
    const chosen = { ...metrics(-Math.log(p), entropy, this.model.config.vocab_size), rank, likeliest };
    return this.#add(id, chosen, false, null);
  }

  /**
   * Return the logits for the next token.
   *
   * Inside the context the cache has all tokens but the newest. Beyond it no cache is exact: the deeper keys of a
   * window were computed with context that has left it. There the last block_size tokens are read again for each token.
   */
  *#predict() {
    const start = Math.max(0, this.tokens.length - this.model.config.block_size);
    if (start !== this.start) this.#begin(start);
    for (;;) {
      const at = this.start + this.cache.length;
      const part = this.tokens.slice(at, at + this.piece).map((token) => token.id);
      const last = at + part.length === this.tokens.length;
      const logits = readTokens(this.model, this.cache, part, last ? 1 : 0);
      if (last) return logits;
      yield [];
    }
  }

  #begin(start) {
    this.start = start; // the index of the token that is at the cache's first position
    this.cache.length = 0;
  }

  #rows(logits) {
    const V = this.model.config.vocab_size;
    return Array.from({ length: logits.length / V }, (_, i) => logits.subarray(i * V, (i + 1) * V));
  }

  #metrics(logits, id) {
    return tokenMetrics(logits, id, this.count);
  }

  #add(id, found, prompt, sampled) {
    const name = (other) => this.characters[other] || NO_CHARACTER;
    const alternatives = found.likeliest.map(([other, p]) => [name(other), p]);
    const token = { id, text: name(id), prompt, sampled, alternatives, ...found };
    this.tokens.push(token);
    return [token];
  }
}
