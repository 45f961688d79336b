"""Projections of the journal: what is folded from it, and the one way they are read.

Nothing in this room is true by itself: every table here can be dropped and folded again from the
journal, and comes out equal.
"""
