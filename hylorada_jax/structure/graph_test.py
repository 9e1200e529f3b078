"""Oracles: the definitions, computed plainly in numpy; and laws of a ranking."""

import numpy as np
import pytest

from hylorada_jax.errors import ConfigError, DataError
from hylorada_jax.structure.graph import MEASURES, importance_buckets, node_ids

networkx = pytest.importorskip("networkx")


def random_graph(seed, directed=False):
    return networkx.gnp_random_graph(60, 0.06, seed=seed, directed=directed)


def degree(graph):
    return {node: sum(node in edge for edge in graph.edges) for node in graph}


def pagerank(graph):
    """The stationary distribution, by solving for it."""
    nodes = list(graph)
    links = networkx.to_numpy_array(graph, nodes)
    out = links.sum(1, keepdims=True)
    walk = np.where(out > 0, links / np.maximum(out, 1), 1 / len(nodes))
    rank = np.linalg.solve(np.eye(len(nodes)) - 0.85 * walk.T, np.full(len(nodes), 0.15 / len(nodes)))
    return dict(zip(nodes, rank, strict=True))


def core(graph):
    """The largest k for which a node survives the removal of all nodes of fewer than k neighbours."""
    neighbours = {node: {*graph.pred[node], *graph.succ[node]} - {node} for node in graph}
    numbers = dict.fromkeys(graph, 0)
    for k in range(1, len(graph)):
        left = set(graph)
        while weak := {node for node in left if len(neighbours[node] & left) < k}:
            left -= weak
        numbers |= dict.fromkeys(left, k)
    return numbers


@pytest.mark.parametrize("directed", [False, True])
@pytest.mark.parametrize(
    ("measure", "definition"), [("degree", degree), ("pagerank", pagerank), ("core", core)]
)
def test_buckets_rank_nodes_by_the_definition(measure, definition, directed):
    graph = random_graph(1, directed)
    importance = definition(graph.to_directed() if measure == "core" else graph)
    found = importance_buckets(graph, measure, num_buckets=16)
    values = np.array([importance[node] for node in graph])
    for node in graph:
        # As in the implementation, what differs in the last digits only is equal.
        smaller = int((values < importance[node] * (1 - 1e-9)).sum())
        assert found[node] == 16 * smaller // len(graph)


@pytest.mark.parametrize("measure", MEASURES)
def test_buckets_do_not_depend_on_the_order_of_nodes_and_edges(measure):
    graph = random_graph(2)
    edges = list(graph.edges)
    np.random.default_rng(0).shuffle(edges)
    other = networkx.Graph([edge[::-1] for edge in edges])
    other.add_nodes_from(graph)
    assert importance_buckets(other, measure) == importance_buckets(graph, measure)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize(
    "graph", [networkx.cycle_graph(101), networkx.complete_graph(7), networkx.path_graph(1)]
)
def test_nodes_that_are_alike_have_one_bucket(measure, graph):
    assert set(importance_buckets(graph, measure).values()) == {0}


@pytest.mark.parametrize("measure", ["degree", "pagerank"])
def test_the_hub_of_a_star_is_above_all_its_leaves(measure):
    found = importance_buckets(networkx.star_graph(99), measure)
    assert found == {0: 63} | dict.fromkeys(range(1, 100), 0)  # ⌊64·99/100⌋


def test_distinct_importance_fills_the_buckets_alike():
    graph = networkx.MultiGraph([(0, node) for node in range(1, 65) for _ in range(node)])
    counts = np.bincount(list(importance_buckets(graph, "degree", num_buckets=13).values()))
    assert counts.tolist() == [5] * 13


@pytest.mark.parametrize("measure", MEASURES)
def test_every_kind_of_graph_is_taken(measure):
    edges = [("a", "b"), ("b", "b"), ("a", "b"), ("c", "a")]
    for kind in (networkx.Graph, networkx.DiGraph, networkx.MultiGraph, networkx.MultiDiGraph):
        graph = kind(edges)
        graph.add_edge("c", "d", weight=-3)
        found = importance_buckets(graph, measure, num_buckets=4)
        assert set(found) == set("abcd")
        assert set(found.values()) <= set(range(4))


def test_a_walk_has_the_ids_of_its_nodes():
    graph = random_graph(3)
    buckets = importance_buckets(graph)
    walk = [5, 7, 5, 59]
    assert node_ids(buckets, walk).tolist() == [buckets[node] for node in walk]
    for alien in (60, [60]):
        with pytest.raises(DataError, match="60"):
            node_ids(buckets, [5, alien])  # type: ignore[list-item]


def test_unusable_graphs_and_settings_are_refused(monkeypatch):
    graph = random_graph(4)
    with pytest.raises(ConfigError, match="pagerank"):
        importance_buckets(graph, "betweenness")  # type: ignore[arg-type]
    for number in (0, 10**30, 2.5):
        with pytest.raises(ConfigError, match="num_buckets"):
            importance_buckets(graph, num_buckets=number)  # type: ignore[arg-type]
    for alien in (None, [(1, 2)], {1: [2]}, np.ones((2, 2))):
        with pytest.raises(DataError, match="networkx"):
            importance_buckets(alien)
    with pytest.raises(DataError, match="empty"):
        importance_buckets(networkx.Graph())
    monkeypatch.setitem(__import__("sys").modules, "networkx", None)
    with pytest.raises(DataError, match="pip install"):
        importance_buckets(graph)
