"""`flux-quant bench`: suites of measurements, each a table of cases, and one record format for all of them."""
