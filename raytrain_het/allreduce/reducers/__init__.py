"""The weighted all-reduce: ``g = sum_i w_i g_i / sum_i w_i`` over whoever takes part, the same bits on all members.

A *reducer* takes one bucket from local gradients to their mean. There are four kinds, behind one protocol
(``base.py``): ``owner_shards.py``, ``all_gather.py``, ``by_machine.py`` and ``low_rank.py``; the last two hand their
sums to another one. :func:`reducer_for` chooses them from a generation's record, and returns a :class:`Reducer` for all
buckets (``reducer.py``); :class:`ReducerByEpoch` replaces it where codecs warm up.

What kinds share they have, and do not inherit: the record with its group (``generation_group.py``), messages with
headers (``messages.py``), encoding and adding up (``gradient_coder.py``), and shards on their way to owners
(``to_owners.py``).

Symbols: ``N`` members, ``n`` elements of a bucket, ``w_i`` the weight of member ``i``'s gradient, ``W = sum_i w_i``.
"""

from raytrain_het.allreduce.reducers.base import BucketReducer, SendBuffer
from raytrain_het.allreduce.reducers.generation_group import Traffic
from raytrain_het.allreduce.reducers.reducer import Reducer, ReducerByEpoch, reducer_for

__all__ = ["BucketReducer", "Reducer", "ReducerByEpoch", "SendBuffer", "Traffic", "reducer_for"]
