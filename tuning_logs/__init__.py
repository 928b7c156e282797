"""MetaSchedule databases that ship with the package, one folder per target, listed in ``manifest.json``."""
