"""The benchmark: its method, the peers (other engines) and the report."""
