"""What runs inside of a worker process.

In reading order: ``user.py`` (what a training function calls), ``draft.py`` (what it prepares), ``joining.py`` (the
parts of a worker that has joined), ``worker.py``, then ``step/`` (one step), ``data/`` (which samples it uses),
``state/`` (replicas, healing, checkpoints, reports) and ``checks/`` (what is refused, and why).
"""
