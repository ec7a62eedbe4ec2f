"""Sweeps: many configurations of several algorithms on several environments, described in one small file.

``sweep_file`` says what is asked for, ``folder`` what is there, ``plan`` what is left to do and in which programs, ``work``
what one process does, ``engines`` where processes run, ``driver`` puts them together, and ``search`` asks Optuna what to try
next.
"""
