"""A bag-of-words classifier of labels in cross-validation: how far the words alone, without their order, tell the sides
apart. A reward must beat it."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from scipy.sparse import csr_array
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from lit_did.audit.data.words import Words

FOLDS = 5
_BUCKETS = 1 << 16
_LEAST = 20  # pairs that a model is fitted to


class BagOfWords:
    """Logistic regression on counts of chosen less rejected words, over the square root of how many words both have.

    Words are hashed into 65,536 buckets. A prompt belongs to one of five folds, and every pair is judged by the model
    that was fitted to the sampled pairs of the other folds. So no model has seen a prompt that it judges.

    Args:
        sample: Places of sampled pairs, and their words.
        folds: [pairs] of all pairs.
    """

    def __init__(self, sample: Iterable[tuple[np.ndarray, Words]], folds: np.ndarray) -> None:
        self.weights = np.full((FOLDS, _BUCKETS), np.nan, np.float32)
        places, columns, values, lengths = [], [], [], []
        for of_chunk, words in sample:
            pairs, buckets, signs = _features(words)
            sizes = np.bincount(pairs, minlength=len(of_chunk))
            places.append(of_chunk)
            columns.append(buckets)
            values.append(signs / np.sqrt(sizes)[pairs])
            lengths.append(sizes)
        if not places:
            return
        starts = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
        features = csr_array((np.concatenate(values), np.concatenate(columns), starts), (len(starts) - 1, _BUCKETS))
        features.sum_duplicates()
        features.eliminate_zeros()
        # A pair and the pair with swapped sides are the same to a model without a constant.
        signs = np.where(np.arange(len(starts) - 1) % 2, 1.0, -1.0)
        features = features.multiply(signs[:, None]).tocsr()
        fold = folds[np.concatenate(places)]
        used = np.unique(features.indices)  # the weight of any other bucket is 0
        features = features[:, used]
        for number in range(FOLDS):
            seen = fold != number
            if seen.sum() >= _LEAST and features[seen].nnz:
                model = LogisticRegression(fit_intercept=False, C=1.0, max_iter=200, tol=1e-3)
                model.fit(features[seen], signs[seen] > 0)
                self.weights[number] = 0
                self.weights[number, used] = model.coef_[0]

    def probabilities(self, words: Words, folds: np.ndarray) -> np.ndarray:
        """[pairs] the probability that the label is right; NaN where there are too few pairs for a model.

        Args:
            words: Those of prompt, chosen and rejected of pairs.
            folds: [pairs].
        """
        pairs, buckets, signs = _features(words)
        sizes = np.bincount(pairs, minlength=len(folds))
        sums = np.bincount(pairs, self.weights[folds[pairs], buckets] * signs, minlength=len(folds))
        return expit(sums / np.sqrt(np.maximum(sizes, 1)))


def draw_folds(groups: np.ndarray, seed: int) -> np.ndarray:
    """[pairs] the fold of each pair. Pairs of a prompt are in the same one.

    Args:
        groups: [pairs] the number of each prompt, from 0.
        seed: Of the draw.
    """
    return (np.random.default_rng(seed).permutation(int(groups.max(initial=-1)) + 1) % FOLDS)[groups]


def _features(words: Words) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each word of the sides: the number of its pair, its bucket, and 1 if it is chosen, -1 if rejected."""
    texts = np.repeat(np.arange(len(words.offsets) - 1, dtype=np.int32), np.diff(words.offsets))
    part = texts % 3
    kept = part > 0
    buckets = (words.numbers[kept] >> np.uint64(48)).astype(np.int32)
    return texts[kept] // 3, buckets, np.where(part[kept] == 1, np.float32(1), np.float32(-1))
