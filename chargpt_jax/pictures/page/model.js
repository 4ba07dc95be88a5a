// The model: token ids in, logits out. The same mathematics as chargpt_jax/model/gpt.py, without a library.
//
// A decoder of pre-LayerNorm blocks with rotary positions and an embedding tied to the head. arithmetic.js has the
// operations. Axes: T positions that are read, S positions of the cache (block_size), C channels (n_embd),
// D head width, W = n_head * D, V vocabulary.

const ROPE_BASE = 10000;
const MASKED = -1e9; // the logit of an unused token id: its probability is exactly 0
const PADDING = 0; // the token id of no character

/**
 * Put a model together.
 *
 * @param config the fields of ModelConfig: vocab_size, used_ids, block_size, n_embd, n_head, n_head_dim, n_ff, n_layer,
 *   mask_unused_ids.
 * @param names [name, number of elements] of each array, in their order in `values`.
 * @param values Float32Array with the elements of all arrays.
 * @throws RangeError if the values have another length.
 */
function createModel(config, names, values) {
  const exact = new Float64Array(values);
  const parts = {};
  let at = 0;
  for (const [name, size] of names) {
    const dot = name.lastIndexOf(".");
    const own = (parts[name.slice(0, dot)] ??= {});
    own[name.slice(dot + 1)] = exact.subarray(at, at + size);
    at += size;
  }
  if (at !== values.length) throw new RangeError(`it has ${values.length} values, but must have ${at}`);
  return { config, parts, ...angles(config), parameters: at, ofToken: [] };
}

/** Return cos and sin of each position's angles, [S, D / 2]; the angles are float32, as in Python. */
function angles({ block_size, n_head_dim }) {
  const half = n_head_dim / 2;
  const cos = new Float64Array(block_size * half);
  const sin = new Float64Array(block_size * half);
  for (let i = 0; i < half; i++) {
    const frequency = Math.fround(ROPE_BASE ** Math.fround((-2 * i) / n_head_dim));
    for (let position = 0; position < block_size; position++) {
      const angle = Math.fround(position * frequency);
      cos[position * half + i] = Math.cos(angle);
      sin[position * half + i] = Math.sin(angle);
    }
  }
  return { cos, sin };
}

/**
 * Return an empty KV cache: per layer keys [S, W] and values [W, S], of which `length` positions are filled.
 *
 * A query meets the keys channel by channel, and its weights meet the values position by position: both are in the
 * order of memory.
 */
function createCache({ config }) {
  const size = config.block_size * config.n_head * config.n_head_dim;
  const layer = () => ({ keys: new Float64Array(size), values: new Float64Array(size) });
  return { length: 0, layers: Array.from({ length: config.n_layer }, layer) };
}

/**
 * Read the next T tokens: fill the cache, and predict.
 *
 * @param ids T token ids at positions cache.length, cache.length + 1, ..., all below block_size.
 * @param wanted of how many of them, counted from the last one, the prediction is wanted.
 * @returns Float64Array, logits [wanted, V] for the token after each of them.
 */
function readTokens(model, cache, ids, wanted) {
  const { vocab_size: V, n_embd: C, n_layer, mask_unused_ids, used_ids } = model.config;
  const table = model.parts.wte.embedding;
  let x = new Float64Array(ids.length * C);
  ids.forEach((id, t) => x.set(table.subarray(id * C, (id + 1) * C), t * C));
  for (let layer = 0; layer < n_layer; layer++) {
    // The last layer's output is computed only where it is wanted; its keys and values are needed everywhere.
    x = block(model, cache, layer, x, ids, layer < n_layer - 1 ? ids.length : wanted);
  }
  cache.length += ids.length;
  const logits = new Float64Array(wanted * V);
  const normed = layerNorm(x, wanted, model.parts.ln_f);
  multiply(view(logits, V), view(normed, C), view(table, C), wanted, V, C);
  if (mask_unused_ids) {
    for (let row = 0; row < logits.length; row += V) {
      logits[row + PADDING] = MASKED;
      logits.fill(MASKED, row + used_ids, row + V);
    }
  }
  return logits;
}

/** One layer: x + attention(norm(x)), then x + mlp(norm(x)). Maps x [T, C] to its last positions, [wanted, C]. */
function block(model, cache, layer, x, ids, wanted) {
  const T = ids.length;
  const q = layer === 0 ? projectTokens(model, cache, ids, wanted) : project(model, cache, layer, x, T, wanted);
  const y = x.slice((T - wanted) * model.config.n_embd);
  add(y, attention(model, cache, layer, q, cache.length + T, wanted));
  const hidden = linear(layerNorm(y, wanted, part(model, layer, "ln_2")), wanted, part(model, layer, "mlp.up"));
  for (let i = 0; i < hidden.length; i++) hidden[i] = gelu(hidden[i]);
  add(y, linear(hidden, wanted, part(model, layer, "mlp.down")));
  return y;
}

/** Write the keys and values of x [T, C] into the cache; return the queries of its last positions, [wanted, W]. */
function project(model, cache, layer, x, T, wanted) {
  const { n_embd: C, n_head, n_head_dim, block_size: S } = model.config;
  const W = n_head * n_head_dim;
  const { kernel, bias } = part(model, layer, "attn.qkv"); // their rows: W of queries, W of keys, W of values
  const { keys, values } = cache.layers[layer];
  const start = cache.length;
  const normed = layerNorm(x, T, part(model, layer, "ln_1"));
  for (let t = 0; t < T; t++) keys.set(bias.subarray(W, 2 * W), (start + t) * W);
  multiply(view(keys, W, start * W), view(normed, C), view(kernel, C, W * C), T, W, C);
  for (let t = 0; t < T; t++) rotate(model, keys, (start + t) * W, start + t);
  for (let row = 0; row < W; row++) values.fill(bias[2 * W + row], row * S + start, row * S + start + T);
  multiply(view(values, S, start), view(kernel, C, 2 * W * C), view(normed, C), W, T, C);
  const ofQueries = { kernel: kernel.subarray(0, W * C), bias: bias.subarray(0, W) };
  const q = linear(normed.subarray((T - wanted) * C), wanted, ofQueries);
  for (let t = 0; t < wanted; t++) rotate(model, q, t * W, start + T - wanted + t);
  return q;
}

/** Do the same for the first layer, whose input is a token's embedding: the vectors of each id are computed once. */
function projectTokens(model, cache, ids, wanted) {
  const { n_embd: C, n_head, n_head_dim, block_size: S } = model.config;
  const W = n_head * n_head_dim;
  const { keys, values } = cache.layers[0];
  const q = new Float64Array(wanted * W);
  ids.forEach((id, t) => {
    const position = cache.length + t;
    const own = (model.ofToken[id] ??= linear(
      layerNorm(model.parts.wte.embedding.subarray(id * C, (id + 1) * C), 1, part(model, 0, "ln_1")),
      1,
      part(model, 0, "attn.qkv"),
    ));
    keys.set(own.subarray(W, 2 * W), position * W);
    rotate(model, keys, position * W, position);
    for (let row = 0; row < W; row++) values[row * S + position] = own[2 * W + row];
    const query = t - ids.length + wanted;
    if (query < 0) return;
    q.set(own.subarray(0, W), query * W);
    rotate(model, q, query * W, position);
  });
  return q;
}

/** Return what the last positions before `end`, with queries q [wanted, W], find at all positions: [wanted, C]. */
function attention(model, cache, layer, q, end, wanted) {
  const { n_head, n_head_dim: D, block_size: S } = model.config;
  const W = n_head * D;
  const { keys, values } = cache.layers[layer];
  const y = new Float64Array(wanted * W);
  const weights = new Float64Array(wanted * end);
  for (let head = 0; head < n_head; head++) {
    weights.fill(0);
    multiply(view(weights, end), view(q, W, head * D), view(keys, W, head * D), wanted, end, D);
    for (let t = 0; t < wanted; t++) softmax(weights, t * end, end - wanted + t + 1, (t + 1) * end, D ** -0.5);
    multiply(view(y, W, head * D), view(weights, end), view(values, S, head * D * S), wanted, D, end);
  }
  return linear(y, wanted, part(model, layer, "attn.proj"));
}

/** Return the arrays of a part of a layer: kernel or scale, and bias. */
function part(model, layer, name) {
  return model.parts[`blocks.${layer}.${name}`];
}

/** Rotate all heads of a vector [H, D] in x: pair (i, i + D / 2) of a head turns by the position's angle. */
function rotate({ config, cos, sin }, x, start, position) {
  const half = config.n_head_dim / 2;
  for (let head = 0; head < config.n_head; head++) {
    const at = start + 2 * half * head;
    for (let i = 0; i < half; i++) {
      const c = cos[position * half + i];
      const s = sin[position * half + i];
      const a = x[at + i];
      const b = x[at + half + i];
      x[at + i] = a * c - b * s;
      x[at + half + i] = b * c + a * s;
    }
  }
}
