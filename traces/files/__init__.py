"""Trace files as bytes: lines and Parquet, read in bounded memory into columns."""
