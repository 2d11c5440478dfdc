"""Damaged input, thousands of cases of each kind: nothing but one clear message may come of it.

    make fuzz                                       # 10,000 cases of each kind
    make fuzz ARGS='--only images --cases 500'
    make fuzz ARGS='--only images --case 4711'      # one case again, with its traceback

A case is made from (seed, kind, number) alone, so that a number is all that it takes to see it again.
"""
