"""The digits job: ``job.py`` has its keys and needs no torch, ``training.py`` has its data, model and training."""
