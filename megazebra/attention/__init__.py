"""Attention kernels of one rank: one file per backend, one mask for all of them. Knows no process groups.

Shapes: B batch, S queries, T keys (S <= T, aligned at the end), H query heads, G key/value heads, D head dim.
Query i of row b sees key j when, with offset = T - S,

    j <= i + offset                       (causal)
    j >  i + offset - window              (local layers)
    j >= document_start[b, i]             (packed documents)
"""

from megazebra.attention.backend import BackendChoice, backend_names, load_backend, resolve_backend
from megazebra.attention.packing import Packing

__all__ = ["BackendChoice", "Packing", "backend_names", "load_backend", "resolve_backend"]
