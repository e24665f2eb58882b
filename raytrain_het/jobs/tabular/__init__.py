"""The tabular job: ``job.py`` has its keys and needs no torch, ``training.py`` its model and training.

The other files read a table: ``file.py`` opens and unpacks it, ``csv_dialect.py`` finds out how a CSV file is written,
``reading.py`` reads it, ``columns.py`` chooses and checks its columns, ``data.py`` makes the arrays that workers map.
"""
