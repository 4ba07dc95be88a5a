// The operations of the model on arrays, in float64: in JavaScript that takes less time than float32.
//
// A kernel is [out, in], so that both factors of a product are read in the order of memory.

const EPSILON = 1e-5; // of LayerNorm

/** Map x [rows, in] to [rows, out] with a kernel [out, in] and a bias [out]. */
function linear(x, rows, { kernel, bias }) {
  const fanOut = bias.length;
  const fanIn = kernel.length / fanOut;
  const y = new Float64Array(rows * fanOut);
  for (let row = 0; row < rows; row++) y.set(bias, row * fanOut);
  multiply(view(y, fanOut), view(x, fanIn), view(kernel, fanIn), rows, fanOut, fanIn);
  return y;
}

/** Replace `count` scores from `at` on by the softmax of their multiples; those up to `end`, which lie ahead, by 0. */
function softmax(scores, at, count, end, scale) {
  const last = at + count;
  let top = -Infinity;
  for (let s = at; s < last; s++) if (scores[s] > top) top = scores[s];
  let sum = 0;
  for (let s = at; s < last; s++) {
    const weight = Math.exp((scores[s] - top) * scale);
    scores[s] = weight;
    sum += weight;
  }
  for (let s = at; s < last; s++) scores[s] /= sum;
  scores.fill(0, last, end);
}

/** Normalise each of the rows of x [rows, C] to mean 0 and variance 1, then scale and shift. */
function layerNorm(x, rows, { scale, bias }) {
  const C = scale.length;
  const y = new Float64Array(rows * C);
  for (let at = 0; at < y.length; at += C) {
    let sum = 0;
    for (let c = 0; c < C; c++) sum += x[at + c];
    const mean = sum / C;
    let squares = 0;
    for (let c = 0; c < C; c++) squares += (x[at + c] - mean) * (x[at + c] - mean);
    const factor = 1 / Math.sqrt(squares / C + EPSILON);
    for (let c = 0; c < C; c++) y[at + c] = (x[at + c] - mean) * factor * scale[c] + bias[c];
  }
  return y;
}

/** Return x P(X < x) for a standard normal X. */
function gelu(x) {
  if (x <= -NORMAL_END) return 0;
  if (x >= NORMAL_END) return x;
  // Between two points of the table: the cubic with their values and slopes, exact to 1e-10.
  const at = (x + NORMAL_END) * NORMAL_STEPS;
  const i = Math.floor(at);
  const t = at - i;
  const p = NORMAL.value[i];
  const rise = NORMAL.value[i + 1] - p;
  const s = NORMAL.slope[i];
  const bend = s + NORMAL.slope[i + 1] - 2 * rise;
  return x * (p + t * (s + t * (rise - s - bend + t * bend)));
}

const NORMAL_END = 8; // P(X < -8) is 6e-16
const NORMAL_STEPS = 64; // points of the table per unit of x
const NORMAL = normalTable();

/** Return the distribution function of a standard normal variable, and its slope per step, at each point. */
function normalTable() {
  const count = 2 * NORMAL_END * NORMAL_STEPS + 1;
  const value = new Float64Array(count);
  const slope = new Float64Array(count);
  for (let i = 0; i < count; i++) {
    const x = i / NORMAL_STEPS - NORMAL_END;
    value[i] = 0.5 + 0.5 * erf(x / Math.SQRT2);
    slope[i] = Math.exp(-0.5 * x * x) / Math.sqrt(2 * Math.PI) / NORMAL_STEPS;
  }
  return { value, slope };
}

/** Return erf(x) by a series whose terms all have the sign of x, so that nothing cancels (DLMF 7.6.2). */
function erf(x) {
  let term = x;
  let sum = x;
  for (let n = 1; Math.abs(term) > 1e-17 * Math.abs(sum); n++) {
    term *= (2 * x * x) / (2 * n + 1);
    sum += term;
  }
  return ((2 / Math.sqrt(Math.PI)) * Math.exp(-x * x)) * sum;
}

/** Add y to x. */
function add(x, y) {
  for (let i = 0; i < x.length; i++) x[i] += y[i];
}

/** A matrix inside of an array: row r begins at `at + r * step`. */
function view(data, step, at = 0) {
  return { data, step, at };
}

/**
 * Add to each out[r][c] the product of x[r] and w[c], two vectors with `depth` elements.
 *
 * Two rows and four columns are computed together, because each loaded value then serves several products: this is four
 * times as fast as one by one. Four vectors of w stay in the fastest memory while all rows pass. At an edge, the last
 * row or column is computed again and stored with the same value.
 */
function multiply(out, x, w, rows, columns, depth) {
  const o = out.data;
  const a = x.data;
  const b = w.data;
  for (let c = 0; c < columns; c += 4) {
    const c1 = Math.min(c + 1, columns - 1);
    const c2 = Math.min(c + 2, columns - 1);
    const c3 = Math.min(c + 3, columns - 1);
    const b0 = w.at + c * w.step;
    const b1 = w.at + c1 * w.step;
    const b2 = w.at + c2 * w.step;
    const b3 = w.at + c3 * w.step;
    for (let r = 0; r < rows; r += 2) {
      const r1 = Math.min(r + 1, rows - 1);
      const o0 = out.at + r * out.step;
      const o1 = out.at + r1 * out.step;
      const a0 = x.at + r * x.step;
      const a1 = x.at + r1 * x.step;
      let s00 = o[o0 + c], s01 = o[o0 + c1], s02 = o[o0 + c2], s03 = o[o0 + c3];
      let s10 = o[o1 + c], s11 = o[o1 + c1], s12 = o[o1 + c2], s13 = o[o1 + c3];
      for (let i = 0; i < depth; i++) {
        const p = a[a0 + i];
        const q = a[a1 + i];
        const u0 = b[b0 + i];
        s00 += p * u0;
        s10 += q * u0;
        const u1 = b[b1 + i];
        s01 += p * u1;
        s11 += q * u1;
        const u2 = b[b2 + i];
        s02 += p * u2;
        s12 += q * u2;
        const u3 = b[b3 + i];
        s03 += p * u3;
        s13 += q * u3;
      }
      o[o0 + c] = s00;
      o[o0 + c1] = s01;
      o[o0 + c2] = s02;
      o[o0 + c3] = s03;
      o[o1 + c] = s10;
      o[o1 + c1] = s11;
      o[o1 + c2] = s12;
      o[o1 + c3] = s13;
    }
  }
}
