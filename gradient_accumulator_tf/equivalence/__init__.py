"""check_equivalence: does a model that accumulates train as on the large batch?"""
