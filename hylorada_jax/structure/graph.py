"""Structure ids of graphs: how important a node is, in buckets."""

from __future__ import annotations

import importlib
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from hylorada_jax.errors import ConfigError, DataError, require_one_of

MEASURES = ("degree", "pagerank", "core")
MAX_BUCKETS = 1 << 20
"""Far more than an encoder knows."""

# Importance that differs by less, relatively, is equal: sums in another order differ in their last digits.
_TIED = 1e-9


def importance_buckets(
    graph: Any, measure: Literal["degree", "pagerank", "core"] = "pagerank", num_buckets: int = 64
) -> dict[Hashable, int]:
    """The bucket of every node of a graph by its importance, by rank among the nodes.

        bucket(v) = ⌊num_buckets · |{u : importance(u) < importance(v)}| / n⌋

    Quantiles, because importance has a long tail in most graphs and another scale in each: they fill the
    buckets alike whatever the measure. Nodes of equal importance have one bucket, whatever their order; the
    least important nodes have bucket 0.

    Args:
        graph: a networkx graph of any kind. Edges count alike: weights are not read.
        measure: degree, of edges in and out; pagerank, with damping 0.85; core, the largest k for which the
            node is in the k-core, of the graph without directions, parallel edges and loops.
        num_buckets: how many buckets, ≥ 1; the encoder knows the ids 0 … 63.

    Returns:
        {node: bucket in 0 … num_buckets − 1}.

    Raises:
        ConfigError: the measure is unknown, or there is no bucket.
        DataError: it is not a graph, has no node, or networkx is not installed.

    Example:
        >>> import networkx
        >>> importance_buckets(networkx.star_graph(3), "degree", num_buckets=4)
        {0: 3, 1: 0, 2: 0, 3: 0}

    Source: method.md, section 5; Page et al. 1999 (PageRank); Seidman 1983 (k-cores).
    """
    require_one_of("measure", measure, MEASURES)
    if not isinstance(num_buckets, int) or not 1 <= num_buckets <= MAX_BUCKETS:
        rule = f"num_buckets must be an integer from 1 to {MAX_BUCKETS:,}."
        raise ConfigError(rule, repr(num_buckets), "Choose 64 or fewer.")
    if not hasattr(graph, "nbunch_iter"):
        rule = "Nodes are ranked in a graph of networkx."
        raise DataError(rule, f"a {type(graph).__name__}", "Make one: networkx.Graph(edges).")
    if not len(graph):
        raise DataError("A graph must have a node to be important.", "an empty graph", "Give its nodes.")
    importance = _importance(graph, measure)
    nodes = list(graph)
    values = np.array([importance[node] for node in nodes], np.float64)
    order = np.argsort(values)
    ascending = values[order]
    begins = np.append(True, np.diff(ascending) > _TIED * ascending[1:])  # a group of nodes that are tied
    smaller = np.maximum.accumulate(np.where(begins, np.arange(len(nodes)), 0))
    buckets = np.empty(len(nodes), np.int64)
    buckets[order] = num_buckets * smaller // len(nodes)
    return dict(zip(nodes, buckets.tolist(), strict=True))


def node_ids(buckets: Mapping[Hashable, int], nodes: Sequence[Hashable]) -> np.ndarray:
    """The ``structure_ids`` of a sequence of nodes, such as a walk over the graph.

    Args:
        buckets: from :func:`importance_buckets`.
        nodes: one node per token.

    Returns:
        int32 [tokens].

    Raises:
        DataError: a node is not in the graph, or can be in none.

    Example:
        >>> node_ids({"a": 0, "b": 5}, ["b", "a", "b"])
        array([5, 0, 5], dtype=int32)
    """
    if missing := [node for node in nodes if not isinstance(node, Hashable) or node not in buckets]:
        raise DataError("Every node must be in the graph.", repr(missing[0]), "Rank the graph that has it.")
    return np.array([buckets[node] for node in nodes], np.int32)


def _importance(graph: Any, measure: str) -> Mapping[Hashable, float]:
    if measure == "degree":
        return dict(graph.degree())
    try:
        networkx: Any = importlib.import_module("networkx")  # optional, and slow to import
    except ImportError as error:
        rule = f"Measuring {measure} takes networkx."
        raise DataError(rule, "it is not installed", "Install them: `pip install networkx scipy`.") from error
    if measure == "pagerank":
        # Far closer than its default, so that what is left of the iteration decides no rank.
        return networkx.pagerank(graph, tol=1e-12, max_iter=1000, weight=None)
    simple = networkx.Graph(graph)
    simple.remove_edges_from(list(networkx.selfloop_edges(simple)))
    return networkx.core_number(simple)
