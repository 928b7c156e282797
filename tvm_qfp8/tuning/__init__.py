"""Search for the best schedule of each kernel with TVM's MetaSchedule, and the logs of what was found.

``workload.py`` says what is tuned, ``search.py`` is the design space as MetaSchedule sees it, ``measure.py`` and
``remote.py`` build and time candidates here or on boards, ``tuner.py`` runs the search, ``logs.py`` keeps the records
and hands ``compile`` the best schedule. AutoTVM, TVM's former tuner, left TVM in 0.20; its logs cannot be read.
"""
