from hypothesis import settings

# Shared machines stall now and then; how long an example takes is no claim of these tests.
settings.register_profile("unit", deadline=None)
settings.load_profile("unit")
