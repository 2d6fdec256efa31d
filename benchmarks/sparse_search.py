"""Exact sparse search on CPU beside its peers, ms a query.

    python benchmarks/sparse_search.py                                 # 200,000 documents, under three minutes
    python benchmarks/sparse_search.py --docs 1000000 --threads 1      # the targets' size
"""
import argparse
import sys
import time
from pathlib import Path

import numpy as np

VOCAB = 128_256


def collection(n_docs: int, n_queries: int, seed: int = 0):
    """Documents and queries as CSR, alike learned sparse vectors in what decides speed: a Zipf-like vocabulary of which most is never
    used, about 155 terms a document with a spread, topics that make terms occur together, weights as log1p of a skewed positive number and
    higher for rare terms, queries written from one document (its strong terms, then expansion from its topic, then common terms)."""
    rng = np.random.default_rng(seed)
    used, topics, per_topic = 40_000, 1000, 800
    ids = rng.permutation(VOCAB)[:used]                                      # token ids do not descend with frequency here: the harder case
    zipf = 1 / (np.arange(used) + 20) ** 0.95
    table = rng.choice(used, 1 << 20, p=zipf / zipf.sum()).astype(np.int32)  # drawing from a table is drawing an index
    topic_terms = np.minimum((used * rng.random((topics, per_topic)) ** 2).astype(np.int32), used - 1)
    rarity = (0.35 + 0.9 * np.log1p(np.arange(used)) / np.log1p(used)).astype(np.float32)

    def draw(topic, n_common, n_topical, gain):
        """`n_common` terms from the whole vocabulary and `n_topical` of the topic's for each of len(topic) texts, made unique: (text, term, weight)."""
        n = len(topic)
        common = table[rng.integers(0, len(table), (n, n_common))]
        topical = topic_terms[topic[:, None], (per_topic * rng.random((n, n_topical)) ** 1.5).astype(np.int32)]
        terms = np.concatenate([common, topical], 1)
        terms[rng.random(terms.shape, dtype=np.float32) > rng.uniform(0.6, 1.0, (n, 1))] = used  # short texts and long ones
        terms.sort(axis=1)
        keep = terms < used
        keep[:, 1:] &= terms[:, 1:] != terms[:, :-1]                         # each term once
        text, term = keep.nonzero()[0], terms[keep]
        skewed = rng.standard_gamma(0.8, len(term)).astype(np.float32)
        return text, term, np.log1p(gain * rarity[term] * skewed + 0.02).astype(np.float32)

    counts, terms, weights, kept = [], [], [], {}
    sources = np.sort(rng.choice(n_docs, n_queries, replace=n_queries > n_docs))
    for lo in range(0, n_docs, 50_000):
        n = min(50_000, n_docs - lo)
        topic = rng.integers(0, topics, n)
        text, term, weight = draw(topic, 150, 52, 2.5)
        ends = np.searchsorted(text, np.arange(n + 1))
        for s in sources[(sources >= lo) & (sources < lo + n)].tolist():
            a, b = ends[s - lo], ends[s - lo + 1]
            kept[s] = topic[s - lo], term[a:b], weight[a:b]
        counts.append(np.diff(ends)), terms.append(ids[term].astype(np.int32)), weights.append(weight)
    docs = np.concatenate([[0], np.cumsum(np.concatenate(counts))]), np.concatenate(terms), np.concatenate(weights)

    q_ptr, q_terms, q_weights = [0], [], []
    for s in sources.tolist():
        topic, term, weight = kept[s]
        own = rng.choice(len(term), min(len(term), 20), replace=False, p=weight / weight.sum())
        _, more, low = draw(np.array([topic]), 13, 13, 0.8)
        vector = dict(zip(more.tolist(), low.tolist())) | dict(zip(term[own].tolist(), (1.2 * weight[own]).tolist()))
        q_terms += ids[list(vector)].tolist()
        q_weights += vector.values()
        q_ptr.append(len(q_terms))
    return docs, (np.array(q_ptr), np.array(q_terms, dtype=np.int32), np.array(q_weights, dtype=np.float32))
