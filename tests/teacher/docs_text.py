"""Python's own documentation as a small real corpus, in word tokens; split by document."""

import pydoc_data.topics
import re

import numpy as np

PREFIX, SUFFIX = 64, 32


class Corpus:
    """Judge documents (even ones) and held-out documents (odd ones), with one vocabulary."""

    def __init__(self):
        texts = [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)]
        pieces = [re.findall(r"\w+|\n|[^\w\s]", text) for text in texts]
        self.words = sorted({piece for document in pieces for piece in document})
        ids = {word: i for i, word in enumerate(self.words)}
        documents = [np.array([ids[piece] for piece in document], dtype=np.int64) for document in pieces]
        self.judge, self.held_out = documents[::2], documents[1::2]
        self.vocab_size = len(self.words)
        self.id = ids

    def samples(self, number):
        """(prefix, suffix) pairs of held-out documents, evenly spread over them."""
        cuts = []
        for document in self.held_out:
            for start in range(0, len(document) - PREFIX - SUFFIX, PREFIX + SUFFIX):
                cuts.append((document[start : start + PREFIX], document[start + PREFIX : start + PREFIX + SUFFIX]))
        return cuts[:: max(1, len(cuts) // number)][:number]
