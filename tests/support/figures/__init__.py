"""The figures of the pages and what stands behind each: a table, a sentence made from results or code, or a constant."""
