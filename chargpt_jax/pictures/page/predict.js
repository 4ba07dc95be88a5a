// What the logits of the model say: probabilities, the metrics of a token, the sampler. The same definitions as in
// chargpt_jax/generation/metrics.py and sampler.py.

const MIN_TEMPERATURE = 1e-6; // below it the most likely token is certain

/** Return the log-probabilities of logits [V] at a temperature, nats. */
function logSoftmax(logits, temperature = 1) {
  let top = -Infinity;
  for (const logit of logits) top = Math.max(top, logit);
  let sum = 0;
  for (const logit of logits) sum += Math.exp((logit - top) / temperature);
  const shift = Math.log(sum);
  return Float64Array.from(logits, (logit) => (logit - top) / temperature - shift);
}

/**
 * Return what the model predicted in place of a token.
 *
 * @param logits Float64Array [V], for this token.
 * @param id the token.
 * @param k number of the most likely tokens to return.
 * @returns surprisal and entropy in nats; s2 = (surprisal - entropy) / log(V); rank, 1 for the most likely token;
 *   likeliest, [id, probability] pairs in descending order.
 */
function tokenMetrics(logits, id, k) {
  const logP = logSoftmax(logits);
  let entropy = 0;
  let rank = 1;
  for (let other = 0; other < logits.length; other++) {
    const p = Math.exp(logP[other]);
    if (p > 0) entropy -= p * logP[other];
    if (logits[other] > logits[id]) rank++;
  }
  const likeliest = largest(logits, k).map((other) => [other, Math.exp(logP[other])]);
  return { ...metrics(-logP[id], entropy, logits.length), rank, likeliest };
}

function metrics(surprisal, entropy, vocabSize) {
  return { surprisal, entropy, s2: (surprisal - entropy) / Math.log(vocabSize) };
}

/** Return the indices of the k largest values, in descending order; of equal values the first comes first. */
function largest(values, k) {
  const found = [];
  for (let i = 0; i < values.length; i++) {
    if (found.length === k && values[i] <= values[found[k - 1]]) continue;
    let at = found.length;
    while (at > 0 && values[i] > values[found[at - 1]]) at--;
    found.splice(at, 0, i);
    found.length = Math.min(found.length, k);
  }
  return found;
}

/**
 * Sample a token.
 *
 * @param logits Float64Array [V].
 * @param temperature 0: the most likely token.
 * @param topK sample from the k most likely tokens; null: from all.
 * @param random a number in [0, 1).
 * @returns the token's id, and the probability with which it was sampled.
 */
function sampleToken(logits, { temperature, topK }, random) {
  if (temperature < MIN_TEMPERATURE) return { id: largest(logits, 1)[0], p: 1 };
  const k = Math.min(topK ?? logits.length, logits.length);
  const smallest = k < logits.length ? Float64Array.from(logits).sort()[logits.length - k] : -Infinity;
  const p = logSoftmax(logits.map((logit) => (logit < smallest ? -Infinity : logit)), temperature).map(Math.exp);
  let rest = random;
  let id = 0;
  for (let other = 0; other < p.length; other++) {
    if (p[other] === 0) continue;
    id = other; // rounding may leave a rest after the last token
    rest -= p[other];
    if (rest < 0) break;
  }
  return { id, p: p[id] };
}

/** Return the random number in [0, 1) of a position: one seed always gives the same text. */
function randomAt(seed, position) {
  let x = Math.imul(seed ^ 0x9e3779b9, 0x85ebca6b) ^ Math.imul(position + 1, 0xc2b2ae35);
  for (const factor of [0x7feb352d, 0x846ca68b]) x = Math.imul(x ^ (x >>> 16), factor) ^ (x >>> 15);
  return ((x ^ (x >>> 16)) >>> 0) / 2 ** 32;
}
