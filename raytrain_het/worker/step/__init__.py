"""One step of one worker, in the order of its parts.

``engine.py`` calls them: open (``generations.py``, ``restore_point.py``, ``passes.py``), gather (``gradients.py``,
``buckets.py``), reduce (``reducing.py``, ``grad_fields.py``), update and commit (``committing.py``).
"""
