"""`python -m spec_decode prove` and the exactness lab: do texts of `decode` follow the target's own distribution?"""
