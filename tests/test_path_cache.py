"""Keys and values of a path: what stays after a chunk, and in which slots."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_openelm.cache.layouts import attention
from mlx_openelm.evaluation.encoding import TokenRequest
from mlx_openelm.evaluation.path_cache import ChunkAttention, PathCache, plain_attention
from mlx_openelm.evaluation.prefix_tree import PrefixTree
from mlx_openelm.machine.device import replaced_choices


def chunks(rows, chunk_size):
    return PrefixTree(chunk_size).chunks([TokenRequest(np.array([*row, 0], np.int32), 1) for row in rows])


def as_keys(chunk):
    """Keys (1, 1, C, 2) that say which token they are of, and where."""
    values = np.stack([chunk.tokens, chunk.positions], axis=1).astype(np.float32)
    return mx.array(values)[None, None]


def slots(cache):
    """The tokens and positions of the path."""
    keys, _ = cache.extend(0, mx.zeros((1, 1, 0, 2)), mx.zeros((1, 1, 0, 2)))
    return np.array(keys[0, 0, : cache.length]).astype(int).tolist()


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 7, 1000])
def test_after_each_chunk_the_path_is_in_its_slots(chunk_size):
    chance = np.random.default_rng(0)
    rows = [chance.integers(1, 4, chance.integers(1, 12)).tolist() for _ in range(20)]
    rows += [[9] * 600, [9] * 300 + [8] * 9]
    cache = PathCache(1)
    path = []
    for chunk in chunks(rows, chunk_size):
        keys = as_keys(chunk)
        cache.extend(0, keys, keys)
        cache.extend_hidden(keys[0, 0])
        everything = path + np.array(keys[0, 0]).astype(int).tolist()
        cache.keep(chunk)
        path = path[: chunk.path_kept] + [everything[len(path) + slot] for slot in chunk.path]
        assert slots(cache) == path
        assert np.array(cache.hidden[: cache.length]).astype(int).tolist() == path
        assert [position for _, position in path] == list(range(len(path)))


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
@pytest.mark.parametrize("block", [1, 3, 100])
def test_attention_reads_the_ancestors_alone(block, backend):
    """With keys of zero all weights are equal, so that the output is the mean of the values of the ancestors."""
    with replaced_choices(backend=backend):
        check_attention(block)


def check_attention(block):
    cache = PathCache(1)
    rows = [[1, 2, 3], [1, 2, 4, 5], [1, 6], [7, 8, 9, 1, 2], [7, 8, 1]]
    for chunk in chunks(rows, 4):
        values = as_keys(chunk)
        attend = ChunkAttention(cache, chunk, block)
        found = attend(0, mx.zeros(values.shape), mx.zeros(values.shape), values)
        cache.extend_hidden(values[0, 0])
        _, stored = cache.extend(0, mx.zeros((1, 1, 0, 2)), mx.zeros((1, 1, 0, 2)))
        before = np.array(stored[0, 0])
        for i, own in enumerate(chunk.ancestors):
            seen = [*before[: chunk.num_ancestors[i]], *(before[chunk.num_kept + j] for j in np.flatnonzero(own))]
            assert np.array(found[0, 0, i]) == pytest.approx(np.mean(seen, axis=0), abs=1e-5)
        cache.keep(chunk)


def test_plain_attention_is_that_of_mlx():
    shapes = (1, 6, 5, 8), (1, 2, 9, 8), (1, 2, 9, 8)
    queries, keys, values = (mx.random.normal(shape, key=mx.random.key(n)) for n, shape in enumerate(shapes))
    mask = mx.array(np.tri(5, 9, 4, dtype=bool))
    expected = np.array(attention(queries, keys, values, mask))
    assert np.array(plain_attention(queries, keys, values, mask)) == pytest.approx(expected, abs=1e-5)


def test_clear_forgets_everything():
    cache = PathCache(2)
    cache.extend(1, mx.zeros((1, 1, 3, 2)), mx.zeros((1, 1, 3, 2)))
    assert cache.nbytes > 0
    cache.clear()
    assert (cache.length, cache.nbytes, cache.arrays) == (0, 0, [])
