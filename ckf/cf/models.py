"""The trainable CF models: matrix factorisation and LightGCN, both with user and item biases."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

# A small start grows the strongest directions of the data first: on CoLLM's ML-1M split it is worth
# 0.005 AUC against 0.1, and the fold-in, which rests on those directions, gains as much.
_INIT_STD = 0.01


class MatrixFactorisation(nn.Module):
    """Koren et al. 2009: score = p_u . q_i + b_u + b_i (+ a global bias that is kept outside)."""

    def __init__(self, n_users: int, n_items: int, dim: int, generator: torch.Generator):
        super().__init__()
        self.users = nn.Parameter(_start(n_users, dim, generator))  # last column: bias
        self.items = nn.Parameter(_start(n_items, dim, generator))

    def tables(self) -> tuple[Tensor, Tensor]:
        """users (U, dim + 1), items (I, dim + 1), the biases last."""
        return self.users, self.items

    def rows(self, users: Tensor, items: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors (B, dim + 1) of both sides and the penalty sum of squares (B,) of the rows."""
        p = nn.functional.embedding(users, self.users)
        q = nn.functional.embedding(items, self.items)
        return p, q, p.square().sum(-1) + q.square().sum(-1)


class LightGCNWithBiases(nn.Module):
    """He et al. 2020, on torch_geometric's LightGCN; the biases are not propagated.

    users, items (L,): the edges, one per liked train row.
    """

    def __init__(self, n_users, n_items, dim, layers, users: Tensor, items: Tensor, generator):
        super().__init__()
        try:
            from torch_geometric.nn.models import LightGCN
        except ImportError as error:
            raise ImportError(
                "cf.kind is 'lightgcn', which needs torch_geometric: pip install torch_geometric, "
                "or set cf.kind to 'mf'"
            ) from error
        n_nodes = n_users + n_items
        self.n_users = n_users
        with torch.random.fork_rng(devices=[]):  # its constructor draws from the global generator
            self.graph = LightGCN(n_nodes, dim, layers, normalize=False)
        start = _start(n_nodes, dim, generator)
        self.graph.embedding.weight.data.copy_(start[:, :-1])
        self.biases = nn.Parameter(torch.zeros(n_nodes, 1))
        self.adjacency = _normalised_adjacency(users, items + n_users, n_nodes)

    def tables(self) -> tuple[Tensor, Tensor]:
        """users (U, dim + 1), items (I, dim + 1), the biases last."""
        nodes = torch.cat([self.graph.get_embedding(self.adjacency), self.biases], 1)
        return nodes[: self.n_users], nodes[self.n_users :]

    def rows(self, users: Tensor, items: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors (B, dim + 1) of both sides and the penalty (B,) on the unpropagated weights."""
        user_table, item_table = self.tables()
        p, q = user_table[users], item_table[items]
        weight = self.graph.embedding.weight
        penalty = weight[users].square().sum(-1) + weight[items + self.n_users].square().sum(-1)
        return p, q, penalty + p[:, -1].square() + q[:, -1].square()


def _start(rows: int, dim: int, generator: torch.Generator) -> Tensor:
    table = torch.randn(rows, dim + 1, generator=generator) * _INIT_STD
    table[:, -1] = 0.0
    return table


def _normalised_adjacency(left: Tensor, right: Tensor, n_nodes: int) -> Tensor:
    """D^-1/2 A D^-1/2 of the undirected graph, sparse CSR: its product is several times faster
    than gathering and scattering edges, and adds up in a fixed order."""
    pairs = torch.unique(torch.cat([left * n_nodes + right, right * n_nodes + left]))  # sorted
    row, column = pairs // n_nodes, pairs % n_nodes
    degree = torch.bincount(row, minlength=n_nodes)
    values = (degree[row] * degree[column]).float().rsqrt()
    starts = torch.cat([degree.new_zeros(1), degree.cumsum(0)])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
        return torch.sparse_csr_tensor(
            starts, column, values, (n_nodes, n_nodes), check_invariants=True
        )
