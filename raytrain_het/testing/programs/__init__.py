"""A generator of training programs: each runs here on several workers, and with torch alone in one process.

``python -m raytrain_het.testing.programs --seed N --count 500`` runs many. One whole number names one program
(:func:`~raytrain_het.testing.programs.drawing.generate`). Its text (:mod:`~raytrain_het.testing.programs.text`) is
what runs, in the workers and in the reference, and what a report of a fault shows. Each ends with a verdict
(:mod:`~raytrain_het.testing.programs.verdict`): the same numbers, refused by name, or something that must not be.
"""
