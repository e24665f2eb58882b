"""What runs inside of a worker process.

In reading order: ``user.py`` (what a training function calls), ``draft.py`` (what it prepares), ``making.py`` (a
worker's parts), ``worker.py``, then ``step/`` (one step), ``data/`` (which samples it uses),
``state/`` (replicas, healing, checkpoints, reports) and ``checks/`` (what is refused, and why).
"""
