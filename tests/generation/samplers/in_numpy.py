"""Every sampler in NumPy, float64: from probabilities [V] to the probabilities that a token is sampled with.

Written for reading, from the formulas of the papers; nothing is imported from the package.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return probabilities."""
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def ln(p: np.ndarray) -> np.ndarray:
    """Return logarithms, -inf for 0."""
    with np.errstate(divide="ignore"):
        return np.log(p)


def entropy(p: np.ndarray) -> float:
    """Return the entropy, nats."""
    return float(-sum(x * math.log(x) for x in p if x > 0))


def keep(p: np.ndarray, kept: Any) -> np.ndarray:
    """Return the distribution of the tokens that are kept."""
    out = np.where(kept, p, 0)
    return out / out.sum()


def temperature(p: np.ndarray, T: float) -> np.ndarray:
    return softmax(ln(p) / max(T, 1e-6))


def top_k(p: np.ndarray, k: int) -> np.ndarray:
    return keep(p, p >= np.sort(p)[::-1][min(k, len(p)) - 1])


def top_p(p: np.ndarray, mass: float) -> np.ndarray:
    return keep(p, [p[p > x].sum() < mass - 1e-12 for x in p])


def min_p(p: np.ndarray, fraction: float) -> np.ndarray:
    return keep(p, p >= fraction * p.max())


def typical(p: np.ndarray, mass: float) -> np.ndarray:
    distance = abs(-ln(p) - entropy(p))
    total, largest = 0.0, 0.0
    for i in np.argsort(distance, kind="stable"):
        total, largest = total + p[i], distance[i]
        if total > mass:
            break
    return keep(p, distance <= largest)


def eta(p: np.ndarray, epsilon: float) -> np.ndarray:
    return keep(p, (p >= min(epsilon, math.sqrt(epsilon) * math.exp(-entropy(p)))) | (p == p.max()))


def top_n_sigma(p: np.ndarray, n: float) -> np.ndarray:
    logits = ln(p)
    return keep(p, logits >= logits.max() - n * logits[p > 0].std())


def p_less(p: np.ndarray) -> np.ndarray:
    return keep(p, (p >= (p**2).sum()) | (p == p.max()))


def xtc(p: np.ndarray, threshold: float) -> np.ndarray:
    """Return the distribution where top choices are excluded."""
    choices = p[p >= threshold]
    return keep(p, p <= choices.min()) if len(choices) else p


def dynatemp(p: np.ndarray, low: float, high: float, exponent: float) -> np.ndarray:
    part = entropy(p) / math.log(max(2, (p > 0).sum()))
    return temperature(p, low + (high - low) * min(max(part, 0), 1) ** exponent)


def edt(p: np.ndarray, T: float, theta: float) -> np.ndarray:
    return temperature(p, T * 0.8 ** (theta / max(entropy(p), 1e-30)))


def counts(text: Sequence[int], last_n: int, size: int) -> np.ndarray:
    return np.bincount(text[-last_n:], minlength=size)


def repetition(p: np.ndarray, text: Sequence[int], penalty: float, last_n: int = 64) -> np.ndarray:
    logits = ln(p)
    changed = np.where(logits > 0, logits / penalty, logits * penalty)
    return softmax(np.where(counts(text, last_n, len(p)) > 0, changed, logits))


def presence(p: np.ndarray, text: Sequence[int], penalty: float, last_n: int = 64) -> np.ndarray:
    return softmax(ln(p) - penalty * (counts(text, last_n, len(p)) > 0))


def frequency(p: np.ndarray, text: Sequence[int], penalty: float, last_n: int = 64) -> np.ndarray:
    return softmax(ln(p) - penalty * counts(text, last_n, len(p)))


def dry(
    p: np.ndarray,
    text: Sequence[int],
    multiplier: float,
    base: float,
    allowed_length: int,
    last_n: int = 1024,
    breakers: Sequence[int] = (),
) -> np.ndarray:
    text, logits = list(text[-last_n:]), ln(p)
    end = text[max([-1] + [i for i, token in enumerate(text) if token in breakers]) + 1 :]
    longest: dict[int, int] = {}
    for j in range(1, len(text)):  # the token at j would repeat what is before it
        n = 0
        while n < min(j, len(end)) and text[j - 1 - n] == end[-1 - n]:
            n += 1
        longest[text[j]] = max(n, longest.get(text[j], 0))
    for token, n in longest.items():
        if n >= allowed_length and token not in breakers:
            logits[token] -= multiplier * base ** (n - allowed_length)
    return softmax(logits)


class Mirostat:
    """Mirostat 2.0, one token after the other."""

    def __init__(self, tau: float, eta: float) -> None:
        self.tau, self.eta, self.shown = tau, eta, 2 * tau

    def __call__(self, p: np.ndarray, sample: Callable[[np.ndarray], int]) -> np.ndarray:
        out = keep(p, (-ln(p) / math.log(2) <= self.shown) | (p == p.max()))
        self.shown -= self.eta * (-math.log2(out[sample(out)]) - self.tau)
        return out


class AdaptiveP:
    """Adaptive-p, one token after the other."""

    def __init__(self, target: float, decay: float) -> None:
        self.target, self.decay, self.mean = target, decay, target

    def __call__(self, p: np.ndarray, sample: Callable[[np.ndarray], int]) -> np.ndarray:
        distance = abs(p - np.clip(2 * self.target - self.mean, 0, 1)) / 0.3
        out = softmax(np.where(p > 0, 5 - 10 * distance**2 / (1 + distance), -np.inf))
        self.mean = self.decay * self.mean + (1 - self.decay) * p[sample(out)]
        return out


class Budget:
    """Temperature as a resource, one token after the other."""

    def __init__(self, capacity: float, low: float, high: float) -> None:
        self.capacity, self.low, self.high, self.budget = capacity, low, high, capacity

    def __call__(self, p: np.ndarray, sample: Callable[[np.ndarray], int]) -> np.ndarray:
        out = temperature(p, self.low + (self.high - self.low) * self.budget / self.capacity)
        change = entropy(p) + math.log(p[sample(out)])
        self.budget = min(max(self.budget + change, 0.0), self.capacity)
        return out
