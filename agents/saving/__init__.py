"""An agent on disk: one record of what it is, `saved.Saved`, and two ways to write it, ``zip.py`` and ``folder.py``.

Nothing here knows an agent. ``agents/restorable.py`` takes one apart and puts it together.
"""
