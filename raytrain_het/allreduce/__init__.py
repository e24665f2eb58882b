"""The weighted all-reduce of a step's gradients.

In reading order: ``jobs.py`` (what the two threads of a worker hand each other), ``communicator.py`` (the communication
thread), ``collectives.py`` (what a generation's members do together), ``reducers/`` (one bucket's all-reduce, of four
kinds), ``codecs/`` (gradients as bytes), ``transport/`` (connections).
"""
