"""Mixtures: selection of records, and how often each is used in an epoch."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynfocus_jax.config import source, stage
from dynfocus_jax.errors import UserError
from dynfocus_jax.records.mixture import Mixture, SourceCounts


def talk(question):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": "a"}]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Annotation files a (10 records), b (4), c (1) and bad (5 entries, 2 of them usable)."""
    root = tmp_path_factory.mktemp("mixture")
    for name, count in (("a", 10), ("b", 4), ("c", 1)):
        entries = [{"id": f"{name}{i}", "conversations": talk(f"{name} {i}")} for i in range(count)]
        (root / f"{name}.json").write_text(json.dumps(entries))
    bad = [
        1,
        {"id": "x", "conversations": talk("x")},
        {"id": "y"},
        {"id": "z", "conversations": talk("z")},
        [],
    ]
    (root / "bad.json").write_text(json.dumps(bad))
    (root / "none.json").write_text("[5]")
    (root / "empty.json").write_text("[]")
    return root


def mixture(root, *sources, seed=0):
    return Mixture(stage(sources=sources), root, seed)


def one(name, **fields):
    return source(name=name, annotations=f"{name}.json", **fields)


def ids(mix, number=0):
    return [mix.records[i].id for i in mix.epoch(number)]


def test_one_file(root):
    mix = Mixture(stage(annotations="b.json"), root, 0)
    assert [(record.id, record.source) for record in mix.records] == [(f"b{i}", "b") for i in range(4)]
    assert mix.counts == {"b": SourceCounts(4, 0, 4, 4)}
    for number in (0, 1, 7):
        epoch = mix.epoch(number)
        assert epoch.dtype == np.int64
        assert epoch.tolist() == [0, 1, 2, 3]


def test_several_sources(root):
    mix = mixture(root, one("b", repeat=2), one("bad"), one("c", repeat=3))
    assert [(record.id, record.source) for record in mix.records] == [
        *((f"b{i}", "b") for i in range(4)),
        ("x", "bad"),
        ("z", "bad"),
        ("c0", "c"),
    ]
    assert mix.counts == {
        "b": SourceCounts(4, 0, 4, 8),
        "bad": SourceCounts(5, 3, 2, 2),
        "c": SourceCounts(1, 0, 1, 3),
    }
    assert [(name, entry.number) for name, entry in mix.refused] == [("bad", 0), ("bad", 2), ("bad", 4)]
    assert Counter(ids(mix)) == {**{f"b{i}": 2 for i in range(4)}, "x": 1, "z": 1, "c0": 3}
    assert ids(mix, 5) == ids(mix)


@pytest.mark.parametrize(
    ("select", "count"),
    [("all", 10), ("first:3", 3), ("first:25%", 3), ("first:30%", 3), ("first:100%", 10), ("first:1%", 1)],
)
def test_first_records(root, select, count):
    mix = mixture(root, one("a", select=select))
    assert ids(mix) == [f"a{i}" for i in range(count)]
    assert mix.counts["a"] == SourceCounts(10, 0, count, count)


def test_first_usable_records(root):
    assert ids(mixture(root, one("bad", select="first:2"))) == ["x", "z"]


@pytest.mark.parametrize(("select", "count"), [("random:4", 4), ("random:35%", 4), ("random:10", 10)])
def test_random_records(root, select, count):
    """Distinct, in order, independent of the other sources, different for another seed."""
    chosen = ids(mixture(root, one("a", select=select)))
    assert len(set(chosen)) == len(chosen) == count
    assert chosen == sorted(chosen)
    assert ids(mixture(root, one("b"), one("a", select=select)))[4:] == chosen
    seeds = {tuple(ids(mixture(root, one("a", select=select), seed=seed))) for seed in range(20)}
    assert len(seeds) == (1 if count == 10 else len(seeds))
    assert count == 10 or len(seeds) > 10
    assert {name for each in seeds for name in each} == {f"a{i}" for i in range(10)}


def test_sources_are_independent(root):
    """Two sources with the same file have different selections and orders."""
    twice = [source(name=name, annotations="a.json", select="random:5") for name in ("x", "y")]
    drawn = [ids(mixture(root, *twice, seed=seed)) for seed in range(20)]
    assert sum(each[:5] != each[5:] for each in drawn) > 15
    parts = [source(name=name, annotations="a.json", weight=1.0) for name in ("x", "y")]
    epochs = [ids(mixture(root, *parts, seed=seed)) for seed in range(5)]
    assert all(epoch[:10] != epoch[10:] for epoch in epochs)


@pytest.mark.parametrize("select", ["first:11", "random:11", "first:150%", "first:0", "random:0%"])
def test_selections_larger_than_the_source(root, select):
    with pytest.raises(
        UserError, match=rf"source 'a': select is '{select}', which is \d+ records, expected 1 to 10"
    ):
        mixture(root, one("a", select=select))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none", "none of the 1 entries of .* is a usable record; the first is record number 0: is 5"),
        ("empty", "none of the 0 entries of .* is a usable record"),
    ],
)
def test_sources_without_a_usable_record(root, name, message):
    with pytest.raises(UserError, match=message):
        mixture(root, one("a"), one(name))


def test_weighted_sources(root):
    """15 samples per epoch, of which the sources have 1/5, 3/5 and 1/5."""
    mix = mixture(root, one("a", weight=1.0), one("b", weight=3.0), one("c", weight=1.0))
    assert [count.epoch for count in mix.counts.values()] == [3, 9, 3]
    epochs = [ids(mix, number) for number in range(10)]
    for epoch in epochs:
        counts = Counter(name[0] for name in epoch)
        assert counts == {"a": 3, "b": 9, "c": 3}
        each = Counter(epoch)
        assert max(each[f"a{i}"] for i in range(10)) == 1  # no record of a larger source is used twice
        assert sorted(each[f"b{i}"] for i in range(4)) == [2, 2, 2, 3]
    assert Counter(name for epoch in epochs for name in epoch if name[0] == "a") == {
        f"a{i}": 3 for i in range(10)
    }
    assert {name for epoch in epochs[:4] for name in epoch if name[0] == "a"} == {f"a{i}" for i in range(10)}
    assert len({tuple(epoch) for epoch in epochs}) == 10  # the epochs differ
    again = mixture(root, one("a", weight=1.0), one("b", weight=3.0), one("c", weight=1.0))
    assert [ids(again, number) for number in range(10)] == epochs


def test_rounding_of_epoch_sizes(root):
    """4.2, 4.8 and 6 of 15: the remaining sample goes to the source that rounding down reduced most."""
    mix = mixture(root, one("a", weight=4.2), one("b", weight=4.8), one("c", weight=6.0))
    assert [count.epoch for count in mix.counts.values()] == [4, 5, 6]


def test_repeat_increases_a_weighted_epoch(root):
    mix = mixture(root, one("b", weight=1.0, repeat=5), one("c", weight=1.0))
    assert [count.epoch for count in mix.counts.values()] == [11, 10]


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.floats(1e-3, 1e3), min_size=3, max_size=3),
    st.integers(0, 2**31),
    st.integers(0, 10**6),
)
def test_weighted_epochs(root, weights, seed, number):
    names = ("a", "b", "c")
    sources = [one(name, weight=weight) for name, weight in zip(names, weights, strict=True)]
    mix = mixture(root, *sources, seed=seed)
    epoch = mix.epoch(number)
    assert len(epoch) == 15
    exact = 15 * np.array(weights) / sum(weights)
    portions = Counter(mix.records[i].source for i in epoch)
    for name, share in zip(names, exact, strict=True):
        assert abs(portions[name] - share) < 1
        assert portions[name] == mix.counts[name].epoch
    # Over 20 epochs, a multiple of the numbers of records, all records of a source are used equally often.
    total = Counter(int(i) for n in range(number, number + 20) for i in mix.epoch(n))
    for i, record in enumerate(mix.records):
        size = {"a": 10, "b": 4, "c": 1}[record.source]
        assert total[i] == 20 * mix.counts[record.source].epoch // size
