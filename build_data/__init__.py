"""Makes training data for any target, in a benchmark's form (Appendix A): `python -m build_data --help`."""
