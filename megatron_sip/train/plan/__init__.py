"""The step budget behind ``tools/plan.py``: operations, bytes and seconds of each part of a step, by arithmetic.

``costs`` counts work, ``hardware`` holds how fast a machine does it, ``speed`` divides the one by the other, ``parts``
and ``budget`` put a step together, ``judging`` adds the judge, ``report`` prints, ``calibrate`` measures a machine.
"""
