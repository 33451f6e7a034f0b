"""Which weight-only int8 and int4 formats and matrix products are there?"""
