"""The language-model job: ``job.py`` has its keys and needs no torch, ``text.py`` its text, ``training.py`` its model
and training."""
